"""How much a visitor may send, before anything reads it: a limit by route, and a pace.

A page's or an API's call is a few kilobytes of JSON; parsing megabytes of it would hold up everybody, login or not. Only
uploads are larger, and they count against what all uploads together may take on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualparal.media.picture import MAX_BYTES
from dualparal.ui.http.refusals import refusal_at

log = logging.getLogger(__name__)
MAX_CALL_BYTES = 64_000  # of a call's body
MAX_UPLOAD_BYTES = 500 * 10**6  # of one upload
BODY_TIMEOUT_S = 30.0  # of a call's whole body, and of every piece of an upload
UPLOAD_TIMEOUT_S = 3600.0  # of a whole upload
FORM_TIMEOUT_S = 300.0  # of a form with a picture
UPLOAD_KEPT_S = 86_400.0
MAX_PICTURE_BYTES = MAX_BYTES + MAX_CALL_BYTES  # of a form with a picture


class _Refused(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class BodiesMiddleware:
    """ASGI middleware: 413 for what is too long, 408 for what does not come."""

    def __init__(self, app: ASGIApp, uploads: Uploads | None = None, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app, self._uploads, self._timeout_s = app, uploads, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        headers = Headers(scope=scope)
        most = _most_of_upload(scope, headers)
        try:
            length = _announced(headers)
            if most is not None:
                most = most if self._uploads is None else min(most, self._uploads.room())
                _check(length, most)
                receive = self._counted(receive, most, UPLOAD_TIMEOUT_S if _is_upload(scope) else FORM_TIMEOUT_S)
            elif length != 0:
                _check(length, MAX_CALL_BYTES)
                receive = _replay(await self._whole(receive), receive)
            await self._app(scope, receive, noting_send)
        except _Refused as refused:
            if not has_begun:
                close = {"Connection": "close"}  # the rest of the body is not read
                await refusal_at(scope["path"], refused.status, str(refused), close)(scope, receive, send)

    async def _whole(self, receive: Receive) -> list[Message]:
        """The messages of a body within its limit and time."""
        messages: list[Message] = []
        num_bytes, until_s = 0, time.monotonic() + self._timeout_s
        while not messages or messages[-1].get("more_body"):
            messages.append(await _in_time(receive, until_s - time.monotonic()))
            num_bytes += len(messages[-1].get("body", b""))
            _check(num_bytes, MAX_CALL_BYTES)
        return messages

    def _counted(self, receive: Receive, limit: int, timeout_s: float) -> Receive:
        num_bytes, until_s, is_whole = 0, time.monotonic() + timeout_s, False

        async def counted() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes after the body is that somebody hangs up, whenever that is
                return await receive()
            message = await _in_time(receive, min(self._timeout_s, until_s - time.monotonic()))
            is_whole = not message.get("more_body")
            num_bytes += len(message.get("body", b""))
            _check(num_bytes, limit)
            return message

        return counted


class Uploads:
    """The folder that uploads are written to, as something that can be full. `max_bytes`: of all that is in it."""

    def __init__(self, folder: Path, max_bytes: int = 4 * MAX_UPLOAD_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def room(self) -> int:
        """Bytes that the next upload may have; old ones go first. Broken-off ones count until they are old."""
        self.clean(UPLOAD_KEPT_S)
        return max(0, self.max_bytes - sum(path.stat().st_size for path in self._files()))

    def clean(self, kept_s: float = 0.0) -> None:
        """Remove what is older than `kept_s`; everything when a server starts, for nobody waits for it any more."""
        now_s = time.time()
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            with contextlib.suppress(FileNotFoundError):
                if now_s - path.stat().st_mtime >= kept_s:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _is_upload(scope: Scope) -> bool:
    return bool(scope["path"].endswith("/upload"))


def _most_of_upload(scope: Scope, headers: Headers) -> int | None:
    """Bytes that a body may have which goes to the disk; None for one that does not."""
    if _is_upload(scope):
        return MAX_UPLOAD_BYTES
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    return MAX_PICTURE_BYTES if is_form and scope["method"] == "POST" and scope["path"] == "/v1/videos" else None


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """`receive` that gives `messages` first."""
    left = iter(messages)

    async def replayed() -> Message:
        message = next(left, None)
        return message if message is not None else await receive()

    return replayed


async def _in_time(receive: Receive, timeout_s: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), max(0.0, timeout_s))
    except TimeoutError:
        raise _Refused(408, "the rest of this request did not come in time; send it again") from None


def _check(num_bytes: int | None, limit: int) -> None:
    if num_bytes is not None and num_bytes > limit:
        raise _Refused(413, f"this request has more than the {limit:,} bytes that may be sent here")


def _announced(headers: Headers) -> int | None:
    """Bytes of the body as its headers have it: 0 where there is none, None where they come in pieces."""
    if "transfer-encoding" in headers:
        return None
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
