"""Starts and ends the worker processes of one engine on this host.

`spawn` as it ships imports the caller's `__main__` again in every worker, so that an unguarded script would start itself; a
stand-in main module is shown to it while processes start. Nothing outlives the front end: workers watch it, and are daemons.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from dualparal.runtime.messages import Shutdown, StorePort, WorkerOptions

log = logging.getLogger(__name__)
_start_lock = threading.Lock()


@contextlib.contextmanager
def _plain_main() -> Iterator[None]:
    """While processes start: an empty `__main__`, and Ctrl-C kept from workers that cannot ignore it yet."""
    with _start_lock:
        real = sys.modules["__main__"]
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = real
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


class WorkerGroup:
    """One generation of workers: N ranks and the codec, their queues and lines. Made anew after a death."""

    def __init__(self, options: WorkerOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self.requests: Any = context.Queue()
        to_codec: Any = context.Queue()
        from_codec: Any = context.Queue()
        self.processes: dict[str, SpawnProcess] = {}
        self._lines: dict[str, Connection] = {}
        self._queues = (self.requests, to_codec, from_codec)
        with _plain_main():
            for rank in range(options.ranks):
                queues = (self.requests, to_codec, from_codec) if rank == 0 else (None, None, None)
                self._start(context, f"rank {rank}", _run_rank, (rank,), (options, *queues))
            self._start(context, "codec", _run_codec, (), (options, to_codec, from_codec))

    def _start(self, context: Any, name: str, target: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(*before, there, *after), name=f"dualparal {name}", daemon=True)
        process.start()
        there.close()
        self.processes[name], self._lines[name] = process, here

    def receive(self, timeout_s: float, also: list[Any]) -> tuple[list[Any], list[str], bool]:
        """Wait for messages: (messages, names of workers that have ended, whether something in `also` is ready).

        A dead worker's last messages come before its name does.
        """
        sentinels = {process.sentinel: name for name, process in self.processes.items()}
        lines = {id(line): name for name, line in self._lines.items()}
        ready = wait([*self._lines.values(), *sentinels, *also], timeout_s)
        messages, ended = [], []
        for thing in ready:
            if id(thing) in lines:
                messages += self._read(lines[id(thing)])
        for thing in ready:
            if isinstance(thing, int) and thing in sentinels:
                ended.append(sentinels[thing])
        return messages, ended, any(thing in also for thing in ready)

    def _read(self, name: str) -> list[Any]:
        found: list[Any] = []
        line = self._lines[name]
        try:
            while line.poll():
                found.append(line.recv())
        except (EOFError, OSError):
            self._lines.pop(name).close()
        return found

    def share_port(self, message: StorePort) -> None:
        """Tell every rank but 0 where to meet."""
        for name, line in self._lines.items():
            if name.startswith("rank") and name != "rank 0":
                with contextlib.suppress(BrokenPipeError):
                    line.send(message)

    def describe_end(self, name: str) -> str:
        """One sentence on how a worker ended."""
        process = self.processes[name]
        process.join(1.0)
        code = process.exitcode
        if code is not None and code < 0:
            try:
                reason = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                reason = f"was killed by signal {-code}"
            if -code == signal.SIGKILL:
                reason += " (out of memory, or killed by hand)"
        else:
            reason = f"ended with exit code {code}"
        return f"{name} {reason}"

    def close(self, grace_s: float) -> None:
        """Ask for a clean end, wait up to `grace_s`, then kill. Leaves no process, queue or pipe behind."""
        if grace_s > 0:
            self.requests.put(Shutdown())
            deadline_s = time.monotonic() + grace_s
            while any(process.is_alive() for process in self.processes.values()) and time.monotonic() < deadline_s:
                for name in list(self._lines):  # a worker that cannot send cannot end
                    self._read(name)
                wait([process.sentinel for process in self.processes.values() if process.is_alive()], 0.05)
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
        for process in self.processes.values():
            process.join()
            process.close()
        for line in self._lines.values():
            line.close()
        for queue in self._queues:
            queue.close()
            queue.cancel_join_thread()


def _run_rank(rank: int, connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    from dualparal.runtime.rank_worker import rank_main

    rank_main(rank, connection, options, *queues)


def _run_codec(connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    from dualparal.runtime.codec_worker import codec_main

    codec_main(connection, options, *queues)
