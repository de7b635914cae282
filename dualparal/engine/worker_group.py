"""Starts and ends the worker processes of one engine: here, and through the listener those of ranks on hosts of torchrun.

Nothing outlives the front end: workers watch it, and are daemons.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import secrets
import shutil
import signal
import tempfile
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from dualparal.hosts.listener import HostListener, RemoteWorker
from dualparal.messages import Shutdown, StorePort, WorkerOptions
from dualparal.ring.spawn import plain_main, start_baseline, start_codec, start_rank

log = logging.getLogger(__name__)
MOST_TO_CODEC = 24  # finished blocks above all: where decoding is slower than denoising, rank 0 waits rather than memory grows


class WorkerGroup:
    """One generation of workers: N ranks and the codec, their queues and lines. Made anew after a death."""

    def __init__(self, options: WorkerOptions, listener: HostListener | None = None) -> None:
        """Raises whatever keeps a process or a queue from being made, and leaves nothing behind."""
        # mkdtemp: for this user alone.
        self._folder = tempfile.mkdtemp(prefix="dualparal-ring-") if options.ranks > 1 and not listener else None
        where = {"listen_address": listener.address} if listener else {"meeting_folder": self._folder}
        self._options = dataclasses.replace(options, ring_key=secrets.token_bytes(32), **where)
        self.processes: dict[str, SpawnProcess | RemoteWorker] = {}
        self._lines: dict[str, Connection] = {}
        self._queues: list[Any] = []
        self._listener = listener
        self._meeting: StorePort | None = None  # until it has been shared
        try:
            self.requests: Any = self._make_queue()
            with plain_main():
                self._start()
            self._call_remote()
        except BaseException:
            self.close(0.0)
            raise

    def _make_queue(self, most: int = 0) -> Any:
        """`most` messages in it at once; whoever brings one more waits. 0: any number."""
        self._queues.append(multiprocessing.get_context("spawn").Queue(most))
        return self._queues[-1]

    def _start(self) -> None:
        options, listener = self._options, self._listener
        to_codec, from_codec = self._make_queue(MOST_TO_CODEC), self._make_queue()
        generation = listener.next_generation() if listener else 0
        for rank in range(options.ranks):
            name = f"rank {rank}"
            if listener and rank in listener.ranks:
                self.processes[name] = RemoteWorker(listener, rank, generation, options)
                continue
            queues = (self.requests, to_codec, from_codec) if rank == 0 else (None, None, None)
            self.processes[name], self._lines[name] = start_rank(rank, options, *queues)
        self.processes["codec"], self._lines["codec"] = start_codec(options, to_codec, from_codec)

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
        news = [self._listener.news] if self._listener else []
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
        self._meeting = dataclasses.replace(message, interface=self._listener.interface()) if self._listener else message
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
            if not isinstance(self.processes[name], RemoteWorker):  # the listener's connections outlive the group
                line.close()
        for queue in self._queues:
            queue.close()
            queue.cancel_join_thread()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class BaselineGroup(WorkerGroup):
    """Plain Wan in one process, for one job."""

    def _start(self) -> None:
        self.processes["baseline"], self._lines["baseline"] = start_baseline(self._options, self.requests)
