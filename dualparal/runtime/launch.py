"""Starts and ends the worker processes of one engine: here, and through the gate those of ranks that torchrun hosts elsewhere.

`spawn` as it ships imports the caller's `__main__` again in every worker, so that an unguarded script would start itself; a
stand-in main module is shown to it while processes start. Nothing outlives the front end: workers watch it, and are daemons.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from dualparal.runtime.gate import Gate, RemoteWorker
from dualparal.runtime.messages import Shutdown, StorePort, WorkerOptions

log = logging.getLogger(__name__)
_start_lock = threading.Lock()


@contextlib.contextmanager
def plain_main() -> Iterator[None]:
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

    def __init__(self, options: WorkerOptions, gate: Gate | None = None) -> None:
        options = dataclasses.replace(options, gate_address=gate.address) if gate else options
        context = multiprocessing.get_context("spawn")
        self.requests: Any = context.Queue()
        to_codec: Any = context.Queue()
        from_codec: Any = context.Queue()
        self.processes: dict[str, SpawnProcess | RemoteWorker] = {}
        self._lines: dict[str, Connection] = {}
        self._queues = (self.requests, to_codec, from_codec)
        self._gate = gate
        self._meeting: StorePort | None = None  # until it has been shared
        generation = gate.next_generation() if gate else 0
        with plain_main():
            for rank in range(options.ranks):
                name = f"rank {rank}"
                if gate and rank in gate.ranks:
                    self.processes[name] = RemoteWorker(gate, rank, generation, options)
                    continue
                queues = (self.requests, to_codec, from_codec) if rank == 0 else (None, None, None)
                self.processes[name], self._lines[name] = start_rank(rank, options, *queues)
            self.processes["codec"], self._lines["codec"] = _start("codec", _run_codec, (), (options, to_codec, from_codec))
        self._call_remote()

    @property
    def far(self) -> list[str]:
        """Workers on other hosts."""
        return [name for name, _ in self._remote()]

    @property
    def missing(self) -> list[str]:
        """Ranks whose hosts have not come yet; there is no deadline for that."""
        return [name for name, worker in self._remote() if not worker.line and not worker.has_ended]

    def receive(self, timeout_s: float, also: list[Any]) -> tuple[list[Any], list[str], bool]:
        """Wait for messages: (messages, names of workers that have ended, whether something in `also` is ready).

        A dead worker's last messages come before its name does.
        """
        self._call_remote()
        sentinels = {process.sentinel: name for name, process in self._local()}
        lines = {id(line): name for name, line in self._lines.items()}
        news = [self._gate.news] if self._gate else []
        ready = wait([*self._lines.values(), *sentinels, *also, *news], timeout_s)
        messages, ended = [], []
        for thing in ready:
            if id(thing) in lines:
                messages += self._read(lines[id(thing)])
            elif thing in news:
                news[0].recv_bytes()
        for thing in ready:
            if isinstance(thing, int) and thing in sentinels:
                ended.append(sentinels[thing])
        ended += [name for name, worker in self._remote() if worker.has_ended]
        return messages, ended, any(thing in also for thing in ready)

    def _read(self, name: str) -> list[Any]:
        process = self.processes[name]
        if isinstance(process, RemoteWorker):
            messages = process.read()
            if process.line is None:
                self._lines.pop(name)
            return messages
        found: list[Any] = []
        line = self._lines[name]
        try:
            while line.poll():
                found.append(line.recv())
        except (EOFError, OSError):
            self._lines.pop(name).close()
        return found

    def _local(self) -> list[tuple[str, SpawnProcess]]:
        return [(name, worker) for name, worker in self.processes.items() if not isinstance(worker, RemoteWorker)]

    def _remote(self) -> list[tuple[str, RemoteWorker]]:
        return [(name, worker) for name, worker in self.processes.items() if isinstance(worker, RemoteWorker)]

    def _call_remote(self) -> None:
        """Start remote workers whose hosts have come since, and let all ranks meet once they are complete."""
        for name, worker in self._remote():
            if name not in self._lines and worker.call():
                assert worker.line is not None
                self._lines[name] = worker.line
        if self._meeting is not None and not self.missing:
            for name, line in self._lines.items():
                if name.startswith("rank"):
                    with contextlib.suppress(OSError):
                        line.send(self._meeting)
            self._meeting = None

    def share_port(self, message: StorePort) -> None:
        """Tell every rank where to meet, once all are there."""
        self._meeting = dataclasses.replace(message, interface=self._gate.interface()) if self._gate else message
        self._call_remote()

    def was_killed(self, name: str) -> bool:
        """Whether a worker's end was none of its own doing."""
        process = self.processes[name]
        return (process.exitcode or 0) < 0 or (isinstance(process, RemoteWorker) and process.is_lost)

    def describe_end(self, name: str) -> str:
        """One sentence on how a worker ended."""
        process, where = self.processes[name], ""
        if not isinstance(process, RemoteWorker):
            process.join(1.0)
        elif process.is_lost:
            return process.describe_loss()
        else:
            where = f" on {process.host}"
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
        return f"{name}{where} {reason}"

    def close(self, grace_s: float) -> None:
        """Ask for a clean end, wait up to `grace_s`, then kill. Leaves no process, queue or pipe behind."""
        if grace_s > 0:
            self.requests.put(Shutdown())
            deadline_s = time.monotonic() + grace_s
            while any(process.is_alive() for process in self.processes.values()) and time.monotonic() < deadline_s:
                for name in list(self._lines):  # a worker that cannot send cannot end
                    self._read(name)
                wait([process.sentinel for _, process in self._local() if process.is_alive()], 0.05)
        for _, worker in self._remote():
            if worker.is_alive():
                worker.kill()
        for _, process in self._local():
            if process.is_alive():
                process.kill()
        for _, process in self._local():
            process.join()
            process.close()
        for name, line in self._lines.items():
            if not isinstance(self.processes[name], RemoteWorker):  # the gate's connections outlive the group
                line.close()
        for queue in self._queues:
            queue.close()
            queue.cancel_join_thread()


def start_rank(rank: int, options: WorkerOptions, *queues: Any) -> tuple[SpawnProcess, Connection]:
    """Start the worker of `rank` on this host: (its process, our end of its line)."""
    return _start(f"rank {rank}", _run_rank, (rank,), (options, *queues))


def _start(name: str, target: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*before, there, *after), name=f"dualparal {name}", daemon=True)
    process.start()
    there.close()
    return process, here


def _run_rank(rank: int, connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    from dualparal.runtime.rank_worker import rank_main

    rank_main(rank, connection, options, *queues)


def _run_codec(connection: Connection, options: WorkerOptions, *queues: Any) -> None:
    from dualparal.runtime.codec_worker import codec_main

    codec_main(connection, options, *queues)
