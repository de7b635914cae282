"""What every worker process has in common: its line to the front end, a heartbeat, and a decent end.

A worker ends at once when the front end dies, ignores Ctrl-C (the front end decides), and reports the error that ends it as
one sentence; the traceback goes to its log.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dualparal.devices import use_pci_order
from dualparal.errors import DualParalError
from dualparal.logs import set_up_logs
from dualparal.messages import Beat, WorkerError, WorkerOptions
from dualparal.ring import meeting

log = logging.getLogger(__name__)
BEAT_INTERVAL_S = 1.0
_step: tuple[str] | None = None  # what the main thread is at; a new tuple for every step


class Uplink:
    """A worker's connection to the front end; any thread may send."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Hand one message to the front end; without one there is nothing left to do."""
        try:
            with self._lock:
                self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)

    def receive(self) -> Any:
        """Wait for a message from the front end (only used while starting)."""
        return self._connection.recv()


def run_worker(name: str, connection: Connection, options: WorkerOptions, serve: Callable[[Uplink], None]) -> None:
    """Run `serve` as the body of this process. Never returns."""
    # Ctrl-C and a service manager's SIGTERM reach every process of the group; the front end ends the workers in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.umask(0o077)  # what workers write, states and texts, is for this user only
    as_json = options.engine.log_json
    set_up_logs(options.engine.verbose, as_json, worker=name, owns_streams=as_json)
    use_pci_order()
    uplink = Uplink(name, connection)
    threading.Thread(target=_watch_front_end, args=(options.meeting_folder,), daemon=True, name="watch").start()
    threading.Thread(target=_beat, args=(uplink,), daemon=True, name="beat").start()
    try:
        serve(uplink)
    except BaseException as error:
        # An error of ours says all there is in its sentence, such as that a neighbour is gone; others are worth their trace.
        log.error("%s ends: %s", name, error, exc_info=not isinstance(error, DualParalError))
        uplink.send(WorkerError(name, *describe_error(name, error)))
        _leave(1)
    _leave(0)


def describe_error(name: str, error: BaseException) -> tuple[str, str]:
    """(class name in `dualparal.errors`, one sentence) for whatever ended a worker or a job."""
    if isinstance(error, DualParalError):
        return type(error).__name__, str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "OutOfMemory", (
            f"{name} ran out of memory; use more ranks, a smaller picture, or smaller num_per_block and num_cat"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "WorkerFailed", f"{name} failed: {type(error).__name__}: {first[:300]}"


def quiet_libraries() -> None:
    """No progress bars of the libraries' own in a worker (they would also leave a semaphore behind)."""
    for library in ("diffusers", "transformers"):
        if library in sys.modules:
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def call_hook(options: WorkerOptions, **parts: Any) -> dict[str, Any]:
    """Let tests and benchmarks replace parts of a worker; returns the parts to use."""
    if options.engine.worker_hook is None:
        return parts
    module, _, function = options.engine.worker_hook.partition(":")
    replaced: dict[str, Any] = getattr(importlib.import_module(module), function)(**parts) or {}
    return {**parts, **replaced}


def working_at(step: str | None) -> None:
    """Name the one step that this process's main thread begins, None when it is done: the heartbeat tells of it, so that a
    hung kernel or decoder is noticed. Costs one write."""
    global _step
    _step = None if step is None else (step,)


def _watch_front_end(meeting_folder: str | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    if meeting_folder is not None:  # it has died before the ranks had met
        meeting.remove(meeting_folder)
    os._exit(1)


def _beat(uplink: Uplink) -> None:
    pause = threading.Event()
    before: tuple[str] | None = None
    busy_s = 0.0
    while not pause.wait(BEAT_INTERVAL_S):
        step = _step
        # Counted, not read off a clock: a process that was stopped for a while has not hung.
        busy_s = busy_s + BEAT_INTERVAL_S if step is not None and step is before else 0.0
        before = step
        uplink.send(Beat(uplink.name, resident_bytes(), _device_bytes(), step[0] if step else "", busy_s, touched_bytes()))


def resident_bytes() -> int | None:
    """Host memory of this process; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def touched_bytes() -> int | None:
    """What this process has read from files so far, or mapped in; None where the system does not tell."""
    try:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return int(counters["rchar"]) + (usage.ru_minflt + usage.ru_majflt) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, KeyError):
        return None


def _device_bytes() -> int | None:
    """What torch has reserved on GPUs, whichever is this process's; None without one. Starts no CUDA by itself."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():
        return None
    return sum(int(cuda.memory_reserved(device)) for device in range(cuda.device_count()))


def _leave(code: int) -> None:
    """End without interpreter teardown: torch and gloo threads may hang or crash in it after a peer's death."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
