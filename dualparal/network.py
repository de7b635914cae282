"""Sockets between hosts: which address and interface to use, and how soon a silent peer counts as lost.

Connections carry pickles, so each begins with a challenge both ways (HMAC over a shared key, as `multiprocessing` does it).
That keeps strangers out; it does not encrypt. torch's rendezvous, gloo and NCCL do neither: the network between the hosts of
one pipeline has to be a trusted one. Linux only. Needs no torch.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

LOST_AFTER_S = 20  # a host that is cut off without a word is noticed within this
HANDSHAKE_S = 10
_SIOCGIFADDR = 0x8915


def own_address(towards: str) -> str:
    """This host's address on the way to `towards` (a name or an address). Raises OSError when there is no way."""
    family, kind, protocol, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the interface that carries the IPv4 `address` ("eth0"); None when none does."""
    if is_loopback(address):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def listen_at(address: str) -> socket.socket:
    """A listening socket on a free port of this host's `address`; "" means all of them."""
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def dial(host: str, port: int, key: bytes) -> tuple[Connection, str]:
    """Connect and pass the challenge: (connection, our own address on it). Raises OSError, EOFError or AuthenticationError."""
    plain = socket.create_connection((host, port), timeout=HANDSHAKE_S)
    own = str(plain.getsockname()[0])
    return _proven(plain, key, answer_challenge, deliver_challenge), own


def admit(plain: socket.socket, key: bytes) -> Connection:
    """The other end of `dial`, for an accepted socket. Raises as `dial` does; a caller that says nothing is dropped."""
    return _proven(plain, key, deliver_challenge, answer_challenge)


def _proven(plain: socket.socket, key: bytes, *steps: Callable[[Connection, bytes], None]) -> Connection:
    connection = _watched(plain)
    try:
        for step in steps:
            step(connection, key)
    except BaseException:
        connection.close()
        raise
    _set_read_timeout(connection, 0)
    return connection


def _watched(plain: socket.socket) -> Connection:
    """A connection whose reads and writes fail within `LOST_AFTER_S` of the peer's silence, idle or not."""
    plain.setblocking(True)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, LOST_AFTER_S // 4), (socket.TCP_KEEPINTVL, LOST_AFTER_S // 4), (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000),
    ):  # fmt: skip
        plain.setsockopt(socket.IPPROTO_TCP, option, value)
    connection = Connection(plain.detach())
    _set_read_timeout(connection, HANDSHAKE_S)
    return connection


def _set_read_timeout(connection: Connection, seconds: int) -> None:
    with socket.socket(fileno=socket.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
