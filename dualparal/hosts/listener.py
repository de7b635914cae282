"""The front end's side of ranks on other hosts: where their processes come in, and a handle on each rank's worker.

The listener outlives worker groups: hosts stay connected while groups come and go. A connection that ends, or is silent for
`network.LOST_AFTER_S`, is the death of that rank's worker.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from dualparal.errors import EngineError
from dualparal.hosts.messages import Farewell, Hello, RankBegun, RankEnded, StartRank, StopRank
from dualparal.hosts.torchrun import SECRET_VARIABLE, Notice, Team, leave_notice
from dualparal.messages import WorkerOptions
from dualparal.network import LOST_AFTER_S, admit, interface_of, is_loopback, listen_at, own_address

log = logging.getLogger(__name__)
FAREWELL_S = 5.0
PAUSE_S = 1.0  # after a caller that could not be let in
ODDITIES = (OSError, EOFError, AuthenticationError)


class HostListener:
    """Takes in the processes that host the ranks other than 0. Close it after the last worker group."""

    def __init__(self, team: Team) -> None:
        """Listen, and leave the notice by which hosts find this front end. Raises `OSError`, `EngineError`."""
        self.ranks = range(1, team.ranks)
        self.news, self._wake = Pipe(duplex=False)  # readable when a host has come
        self._hosts: dict[int, tuple[Connection, Hello]] = {}
        self._lock, self._is_closing = threading.Lock(), threading.Event()
        self._generations = itertools.count(1)
        self.address, host = _addresses(team.master_addr)
        self._addresses: set[str] = set()  # by which hosts have reached this one
        key = "" if os.environ.get(SECRET_VARIABLE) else secrets.token_hex(32)
        self._socket = listen_at(self.address)
        self.notice = Notice(host=host, port=self._socket.getsockname()[1], key=key)
        self._key = self.notice.shared_key(team)
        threading.Thread(target=self._accept, daemon=True, name="dualparal listener").start()
        threading.Thread(target=self._announce, args=(team,), daemon=True, name="dualparal notice").start()

    def host_of(self, rank: int) -> tuple[Connection, Hello] | None:
        """The connection to the process that hosts `rank`, if it is there."""
        with self._lock:
            return self._hosts.get(rank)

    def drop(self, rank: int, connection: Connection) -> None:
        """Close a connection that has ended; the host may come again."""
        with self._lock:
            if rank in self._hosts and self._hosts[rank][0] is connection:
                del self._hosts[rank]
        connection.close()

    def next_generation(self) -> int:
        return next(self._generations)

    def interface(self) -> str | None:
        """The interface over which other hosts have reached this one; the loopback when all are this one."""
        with self._lock:
            found = sorted(self._addresses, key=is_loopback)
        return interface_of(found[0]) if found else None

    def close(self) -> None:
        """Send all hosts home. Their processes end with exit code 0."""
        self._is_closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._socket.close()
        with self._lock:
            leaving = [connection for connection, _ in self._hosts.values()]
            self._hosts.clear()
        for connection in leaving:
            _part(connection, Farewell("the front end has ended"))
        self.news.close()
        self._wake.close()

    # Threads

    def _announce(self, team: Team) -> None:
        try:
            leave_notice(team, self.notice)
        except (EngineError, OSError) as error:
            log.error("the other ranks cannot find this front end: %s", error)

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                plain, address = self._socket.accept()
            except OSError as error:
                if not self._is_closing.wait(PAUSE_S):  # no file to be opened: that passes
                    log.warning("a caller could not be let in: %s", error)
                continue
            try:
                threading.Thread(
                    target=self._welcome, args=(plain, str(address[0])), daemon=True, name="dualparal welcome"
                ).start()
            except RuntimeError as error:  # no more threads
                log.warning("a caller from %s could not be let in: %s", address[0], error)
                plain.close()

    def _welcome(self, plain: socket.socket, address: str) -> None:
        try:
            own = str(plain.getsockname()[0])
            connection = admit(plain, self._key)
            hello = connection.recv()
        except Exception as error:  # whatever a stranger can send, or a lack of files and memory
            log.warning("a caller from %s was turned away: %s: %s", address, type(error).__name__, error)
            plain.close()
            return
        if not isinstance(hello, Hello) or hello.rank not in self.ranks:
            log.warning("a caller from %s was turned away: %s is no rank of this pipeline", address, hello)
            connection.close()
            return
        with self._lock:
            before = self._hosts.get(hello.rank)
            self._hosts[hello.rank] = (connection, hello)
            self._addresses.add(own)
            with contextlib.suppress(OSError):
                self._wake.send_bytes(b"x")
        log.info("rank %d has come from %s", hello.rank, hello.host)
        if before is not None:  # its agent was started again; whoever held it last reads the end of it and closes it
            with contextlib.suppress(OSError):
                before[0].send(Farewell("this rank was started again elsewhere"))
                _shut(before[0], socket.SHUT_RDWR)


class RemoteWorker:
    """The worker of one rank on another host, with what `multiprocessing.Process` says of a local one."""

    def __init__(self, listener: HostListener, rank: int, generation: int, options: WorkerOptions) -> None:
        self._listener, self.rank, self._generation, self._options = listener, rank, generation, options
        self._has_begun = False
        self.line: Connection | None = None  # None before the host has come, and after it was lost
        self.host = ""
        self.exitcode: int | None = None
        self.is_lost = False

    def call(self) -> bool:
        """Have the worker started if its host is there by now; whether it was."""
        if self.line is None and not self.has_ended and (found := self._listener.host_of(self.rank)) is not None:
            self.line, self.host = found[0], found[1].host
            with contextlib.suppress(OSError):  # reading will tell
                self.line.send(StartRank(self._generation, self._options, time.monotonic()))
        return self.line is not None

    @property
    def has_ended(self) -> bool:
        return self.is_lost or self.exitcode is not None

    def is_alive(self) -> bool:
        return self.line is not None and not self.has_ended

    def read(self) -> list[Any]:
        """What has come from the worker; notes its end."""
        found: list[Any] = []
        try:
            while self.line is not None and self.line.poll():
                message = self.line.recv()
                if isinstance(message, RankBegun | RankEnded):
                    if message.generation == self._generation:
                        self._has_begun = True
                        self.exitcode = message.exitcode if isinstance(message, RankEnded) else None
                elif self._has_begun:  # else from the worker of an older group
                    found.append(message)
        except (EOFError, OSError):
            assert self.line is not None
            self._listener.drop(self.rank, self.line)
            self.line, self.is_lost = None, True
        return found

    def kill(self) -> None:
        """Have the worker killed, if its host can be reached."""
        if self.line is not None:
            with contextlib.suppress(OSError):
                self.line.send(StopRank())

    def describe_loss(self) -> str:
        return (
            f"the connection to rank {self.rank} on {self.host} was lost (host or network down, or killed; "
            f"silence counts after {LOST_AFTER_S} s)"
        )


def _addresses(master_addr: str) -> tuple[str, str]:
    """(address to listen on, address for the others): our own on the way to torchrun's first host.

    That host itself may know its name as a loopback address (Debian's 127.0.1.1); the others do not.
    """
    own = own_address(master_addr)
    if not is_loopback(own):
        return own, own
    try:
        socket.inet_aton(master_addr)
        return own, master_addr
    except OSError:
        return (own if master_addr == "localhost" else ""), master_addr


def _part(connection: Connection, farewell: Farewell) -> None:
    """Say goodbye and wait until the other side has read it: closing over unread messages would throw it away."""
    with contextlib.suppress(OSError, EOFError):
        connection.send(farewell)
        _shut(connection, socket.SHUT_WR)
        deadline_s = time.monotonic() + FAREWELL_S
        while wait([connection], max(0.0, deadline_s - time.monotonic())):
            connection.recv_bytes()
    connection.close()


def _shut(connection: Connection, how: int) -> None:
    with socket.socket(fileno=socket.dup(connection.fileno())) as same:
        same.shutdown(how)
