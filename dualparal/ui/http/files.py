"""Files that may be replaced while they are sent, as early looks are with every few steps."""

from __future__ import annotations

import os
import stat

import anyio.to_thread
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

MAX_WHOLE_BYTES = 1 << 20


class WholeFileResponse(FileResponse):
    """A small file is read at once from one open file, so that it is sent as it was or as it is. Starlette asks for its length
    and opens it apart: of a file that is replaced in between it would announce the one's length and send the other's bytes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "GET" or any(name == b"range" for name, _ in scope["headers"]):
            await super().__call__(scope, receive, send)
            return
        try:
            found = await anyio.to_thread.run_sync(_read, self.path)
        except FileNotFoundError:
            await PlainTextResponse("Not found", status_code=404)(scope, receive, send)
            return
        if found is None:
            await super().__call__(scope, receive, send)
            return
        data, status = found
        self.set_stat_headers(status)
        answer = Response(data, self.status_code)
        answer.raw_headers = self.raw_headers
        await answer(scope, receive, send)


def _read(path: str | os.PathLike[str]) -> tuple[bytes, os.stat_result] | None:
    """What is in a small file and what is known of it; None of a long one. Raises OSError."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_WHOLE_BYTES:
            return None
        return file.read(), status
