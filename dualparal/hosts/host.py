"""A rank's process on another host (or merely another process of torchrun): finds the front end, runs the rank's worker for it.

It relays between the worker's pipe and the front end without reading, so that a remote worker is the same program as a local
one. It ends when the front end says farewell, and looks for it again when the connection is lost: the front end may have been
started anew, or a cable may have been pulled. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from dualparal.devices import count_gpus
from dualparal.errors import EngineError, RequestError
from dualparal.hosts.listener import ODDITIES
from dualparal.hosts.messages import Farewell, Hello, RankBegun, RankEnded, StartRank, StopRank
from dualparal.hosts.torchrun import NOTICE_TIMEOUT_S, Team, end_with_the_agent, read_notice
from dualparal.messages import StorePort, WorkerError, WorkerOptions
from dualparal.network import dial, interface_of
from dualparal.options import SAME_ON_HOSTS
from dualparal.ring.spawn import plain_main, start_rank

log = logging.getLogger(__name__)
DIALS_PER_NOTICE = 5  # before the store is asked whether the front end has moved
PAUSE_S = 1.0
OWN_FIELDS = (
    "engine", "folder", "loras", "text_cache", "devices", "codec_device", "clock_ahead_s", "listen_address", "ring_key",
    "meeting_folder",
)  # fmt: skip


def host_rank(team: Team, options: WorkerOptions) -> int:
    """Host the worker of `team.rank` until the front end ends; returns the exit code. `options` are this host's view of the
    same command line: where its files and devices are. Raises `EngineError` when there is no front end to be found."""
    leaving = _take_signals()
    end_with_the_agent()
    is_known = False
    while not leaving.is_set():
        connection, address, own = _join(team, leaving, is_known)
        is_known = True
        if connection is None:
            break
        with connection:
            dispatcher = RankHost(team, options, connection, address, own)
            try:
                if dispatcher.serve(leaving):
                    return 0
            finally:
                dispatcher.end_worker()
        log.warning("rank %d has lost the front end at %s and looks for it again", team.rank, address)
    return 0


def _take_signals() -> threading.Event:
    """Ctrl-C is the front end's to take; SIGTERM (torchrun's way to end or restart a host) makes this process leave."""
    leaving = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        leaving.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    return leaving


def _join(team: Team, leaving: threading.Event, is_known: bool) -> tuple[Connection | None, str, str]:
    """(connection to the front end, its address, our own address); no connection when asked to leave."""
    deadline_s = time.monotonic() + NOTICE_TIMEOUT_S
    reason: BaseException | None = None
    while not leaving.is_set() and time.monotonic() < deadline_s:
        notice = read_notice(team, max(1.0, deadline_s - time.monotonic()), is_known=is_known)
        for _ in range(DIALS_PER_NOTICE):
            try:
                connection, own = dial(notice.host, notice.port, notice.shared_key(team))
                connection.send(Hello(team.rank, socket.gethostname()))
                return connection, notice.host, own
            except ODDITIES as error:
                reason = error
            if leaving.wait(PAUSE_S):
                break
    if leaving.is_set():
        return None, "", ""
    raise EngineError(f"rank {team.rank} found no front end within {NOTICE_TIMEOUT_S:.0f} s: {reason}")


class RankHost:
    """One connection to the front end and the worker that is run for it."""

    def __init__(self, team: Team, options: WorkerOptions, connection: Connection, address: str, own: str) -> None:
        self._team, self._options, self._front_end = team, options, connection
        self._address, self._own = address, own
        self._generation = 0
        self._process: SpawnProcess | None = None
        self._line: Connection | None = None

    def serve(self, leaving: threading.Event) -> bool:
        """Until a farewell (True), or until the connection is lost or `leaving` is set (False)."""
        try:
            while not leaving.is_set():
                things: list[Any] = [self._front_end]
                if self._line is not None:
                    things.append(self._line)
                elif self._process is not None:  # its line has been read to the end
                    things.append(self._process.sentinel)
                for thing in wait(things, PAUSE_S):
                    if thing is self._line:
                        self._relay()
                    elif thing is not self._front_end:
                        self._tell_end()
                    elif self._obey(self._front_end.recv()):
                        return True
        except (EOFError, OSError) as error:
            log.info("connection to the front end: %s", error)
        return False

    def end_worker(self) -> None:
        """Kill the worker, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._line is not None:
            self._line.close()
        self._process = self._line = None

    def _relay(self) -> None:
        assert self._line is not None
        try:
            message = self._line.recv_bytes()
        except (EOFError, OSError):
            self._line.close()
            self._line = None
            return
        self._front_end.send_bytes(message)

    def _tell_end(self) -> None:
        assert self._process is not None
        self._process.join()
        exitcode = self._process.exitcode
        self.end_worker()
        self._front_end.send(RankEnded(self._generation, exitcode or 0))

    def _obey(self, message: object) -> bool:
        match message:
            case StartRank():
                self.end_worker()
                self._generation = message.generation
                self._front_end.send(RankBegun(message.generation))
                self._start(message)
            case StopRank():
                self.end_worker()
            case StorePort():
                if self._line is not None:
                    self._line.send(dataclasses.replace(message, host=self._address, interface=interface_of(self._own)))
            case Farewell():
                log.info("rank %d goes: %s", self._team.rank, message.reason)
                return True
        return False

    def _start(self, message: StartRank) -> None:
        try:
            options = self._merged(message.options, message.sent_s)
        except RequestError as error:
            self._front_end.send(WorkerError(f"rank {self._team.rank}", type(error).__name__, str(error)))
            return
        with plain_main():
            self._process, self._line = start_rank(self._team.rank, options, None, None, None)

    def _merged(self, options: WorkerOptions, sent_s: float) -> WorkerOptions:
        """The front end's options with this host's files and device; raises `RequestError` where the command lines differ."""
        rank, mine = self._team.rank, self._options
        both = {name: (getattr(mine.engine, name), getattr(options.engine, name)) for name in SAME_ON_HOSTS}
        both |= {
            field.name: (getattr(mine, field.name), getattr(options, field.name))
            for field in dataclasses.fields(WorkerOptions)
            if field.name not in OWN_FIELDS
        }
        if not mine.layers:  # layer_split=auto: rank 0 knows its times
            del both["layers"]
        for name, (ours, theirs) in both.items():
            if ours != theirs:
                raise RequestError(
                    f"rank {rank} on {socket.gethostname()} was started with {name}={ours}, rank 0 with {theirs}; "
                    "use the same flags and the same model everywhere"
                )
        device = "cpu" if options.devices[0] == "cpu" else f"cuda:{self._team.local_rank}"
        if device != "cpu" and (num_gpus := count_gpus()) <= self._team.local_rank:
            raise RequestError(
                f"rank {rank} on {socket.gethostname()} needs GPU {self._team.local_rank}, {num_gpus} are visible there; "
                "lower --nproc-per-node"
            )
        devices = tuple(device if r == rank else other for r, other in enumerate(options.devices))
        return dataclasses.replace(
            options, folder=mine.folder, loras=mine.loras, text_cache=mine.text_cache, devices=devices,
            clock_ahead_s=sent_s - time.monotonic(),
        )  # fmt: skip
