"""Whole files and the ranges of them that clients ask for. Follows RFC 9110, section 14.

A file is opened before anything is told of it: deleting or replacing it while it is sent changes nothing of what is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import BinaryIO

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dualparal.ui.guard import CutShort
from dualparal.ui.http.refusals import Refusal

RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
PIECE_BYTES = 1 << 18
FRESH = {"Cache-Control": "no-store"}


def span(asked: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header, stop not above start where there is nothing of it; None where there is no header or none
    that is understood (two ranges are not)."""
    match = RANGE.fullmatch(asked.replace(" ", "")) if asked else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        return (max(0, size - int(last)), size) if int(last) else (0, 0)
    stop = min(size, int(last) + 1) if last else size
    return None if last and int(last) < int(first) else (int(first), stop)


def behind_the_end(size: int, headers: Mapping[str, str]) -> Refusal:
    """The refusal of a range of which there is nothing."""
    headers = {**headers, "Content-Range": f"bytes */{size}"}
    return Refusal(416, f"there are {size} bytes of it", "range_not_satisfiable", headers=headers)


class FileAnswer(Response):
    """A file, or the range of it that is asked for; one that `is_fresh` is never kept by who gets it."""

    def __init__(self, path: Path, media_type: str, *, filename: str = "", is_fresh: bool = False) -> None:
        super().__init__(media_type=media_type)
        self._path, self._about = path, dict(FRESH) if is_fresh else {}
        if filename:
            self._about["Content-Disposition"] = f'inline; filename="{filename}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            opened = await to_thread.run_sync(open, self._path, "rb")
        except OSError:
            await Refusal(404, f"{self._path.name} is not there any more", "gone").answer()(scope, receive, send)
            return
        with opened:
            await self._answer(opened, Request(scope))(scope, receive, send)

    def _answer(self, opened: BinaryIO, request: Request) -> Response:
        status = os.fstat(opened.fileno())
        size, tag, date = (
            status.st_size,
            f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
            formatdate(status.st_mtime, usegmt=True),
        )
        headers = {**self._about, "Accept-Ranges": "bytes", "ETag": tag, "Last-Modified": date}
        is_same = request.headers.get("if-range", tag) in (tag, date)
        part = span(request.headers.get("range"), size) if is_same else None
        if part is not None and not part[0] < part[1]:
            return behind_the_end(size, headers).answer()
        start, stop = part or (0, size)
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers["Content-Length"] = str(stop - start)
        body = _pieces(opened, start, stop) if request.method != "HEAD" else iter(())
        return StreamingResponse(body, 200 if part is None else 206, headers, self.media_type)


async def _pieces(opened: BinaryIO, at: int, stop: int) -> AsyncIterator[bytes]:
    while at < stop:
        data = await to_thread.run_sync(read_at, opened, at, min(PIECE_BYTES, stop - at))
        at += len(data)
        yield data


def read_at(opened: BinaryIO, at: int, num_bytes: int) -> bytes:
    """Some of what is there. Raises `CutShort` where nothing is."""
    try:
        opened.seek(at)
        if data := opened.read(num_bytes):
            return data
    except OSError:
        pass
    raise CutShort("a file has become shorter while it was sent")
