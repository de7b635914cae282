"""How long a connection may take to say what it wants, and how many one address may hold. Follows uvicorn's protocol class.

uvicorn waits for ever for the end of a request's headers; a few thousand connections that never come to it would be all that
the server has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_TIMEOUT_S = 15.0
MAX_PER_ADDRESS = 512  # a tab holds three: its page, its heartbeat, its events
PROXIES = ("127.0.0.1", "::1")  # one address for all who come through a proxy on this machine: it has limits of its own
MAX_IN_ALL = 8192


_open: Counter[str] = Counter()  # connections by address


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol that ends connections which do not get to the point."""

    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        limit = MAX_IN_ALL if address in PROXIES else MAX_PER_ADDRESS
        if _open[address] >= limit or _open.total() >= MAX_IN_ALL:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")  # type: ignore[attr-defined]
            transport.close()
            return
        self._address = address
        _open[address] += 1
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._address is None:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._address is not None:
            _open[self._address] -= 1
            if not _open[self._address]:
                del _open[self._address]
            self._address = None
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()


@contextlib.contextmanager
def patient_server() -> Iterator[None]:
    """Servers that uvicorn sets up inside use `PatientProtocol`; Gradio sets its own up and takes no protocol."""
    protocols: dict[str, Any] = uvicorn.config.HTTP_PROTOCOLS
    before = protocols["auto"]
    protocols["auto"] = f"{__name__}:PatientProtocol"
    try:
        yield
    finally:
        protocols["auto"] = before
