"""The bytes of a video: the mp4 once the job has ended, before that the finished blocks as one MPEG-TS stream that grows.

What was there of the stream stays as it is, so a client that asks for the range behind what it has goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from dualparal.files import is_file
from dualparal.media.writer import thumbnail
from dualparal.ui.guard import CutShort
from dualparal.ui.http.files import WholeFileResponse
from dualparal.ui.http.refusals import RETRY_S, Refusal
from dualparal.ui.snapshot import Snapshot

TS, MP4 = "video/mp2t", "video/mp4"
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
PIECE_BYTES = 1 << 18
FRESH = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Part:
    """A finished block's file and where in the stream it begins."""

    path: Path
    start: int
    num_bytes: int


def video(found: Snapshot, request: Request, kind: str | None) -> Response:
    """The mp4 of a job that has ended, else (or if `kind` is "ts") its finished blocks. Raises `Refusal`."""
    if kind not in (None, "mp4", "ts"):
        raise Refusal(400, "format is mp4 or ts; leave it out for what there is", "invalid_value", param="format")
    if found.video is not None and kind != "ts":
        name = f"dualparal-{found.job_id}.mp4"
        return file(found.video, request, media_type=MP4, filename=name, content_disposition_type="inline")
    if kind == "mp4" or not found.blocks:
        what = "no block of it was finished" if found.is_ended else "no block of it is finished yet; ask again"
        if kind == "mp4" and not found.is_ended:
            what = "the mp4 is made when the video has ended; leave format out for the finished blocks"
        raise Refusal(404, f"video {found.job_id}: {what}", "not_ready", headers={"Retry-After": RETRY_S})
    return _stream(found, request)


def picture(found: Snapshot) -> Path:
    """The first picture as a JPEG, made when it is asked for first. Raises `Refusal`, `OutputError`."""
    target = found.folder.path / "poster.jpg"
    if not is_file(target):
        source = found.video or (Path(found.blocks[0].path) if found.blocks else None)
        if source is None:
            raise Refusal(
                404, f"video {found.job_id}: no block of it is finished yet", "not_ready", headers={"Retry-After": RETRY_S}
            )
        thumbnail(source, target)
    return target


def segment(found: Snapshot, request: Request, block: int) -> Response:
    """One finished block, MPEG-TS. Raises `Refusal`."""
    path = next((Path(ready.path) for ready in found.blocks if ready.block == block), None)
    if path is None or not is_file(path):
        raise Refusal(404, f"video {found.job_id}: block {block} is not finished", "not_ready")
    return file(path, request, media_type=TS)


def file(path: Path, request: Request, *, may_change: bool = False, **about: Any) -> Response:
    """A file, or the range of it that is asked for; one that `may_change` while it is sent is small. A range that is not
    understood is passed over. Raises `Refusal` for one that is behind the end."""
    try:
        size = path.stat().st_size
    except OSError:
        raise Refusal(404, f"{path.name} is not there any more", "gone") from None
    asked = request.headers.get("range")
    span = _span(asked, size)
    if asked is not None and (span is None or not span[0] < span[1]):
        if span is not None and "if-range" not in request.headers:
            raise _behind_the_end(size, {})
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0].lower() != b"range"]
    if may_change:
        return WholeFileResponse(path, headers=FRESH, **about)
    return FileResponse(path, **about)


def rough_block(found: Snapshot, request: Request, block: int) -> Response:
    """How a block was last seen: a JPEG with a small picture for each latent frame, eight in a row. Raises `Refusal`."""
    path = found.folder.look / f"{block:04d}.jpg"
    if not is_file(path):
        raise Refusal(404, f"video {found.job_id}: block {block} has not been seen yet", "not_ready")
    return file(path, request, may_change=True, media_type="image/jpeg")


def _stream(found: Snapshot, request: Request) -> Response:
    """The finished blocks behind one another, or the range of them that is asked for."""
    parts = _parts(found)
    size = parts[-1].start + parts[-1].num_bytes
    tag = f'"{found.job_id}-ts"'
    headers = {"Accept-Ranges": "bytes", "ETag": tag, **FRESH}
    asked = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
    span = _span(asked, size)
    total = str(size) if found.is_ended else "*"
    if span is not None and not 0 <= span[0] < span[1]:
        raise _behind_the_end(size, headers)
    start, stop = span or (0, size)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
    headers["Content-Length"] = str(stop - start)
    body = _bytes(parts, start, stop)
    return StreamingResponse(body, status_code=200 if span is None else 206, media_type=TS, headers=headers)


def _behind_the_end(size: int, headers: dict[str, str]) -> Refusal:
    headers = {**headers, "Content-Range": f"bytes */{size}"}
    return Refusal(416, f"there are {size} bytes of it", "range_not_satisfiable", headers=headers)


def _parts(found: Snapshot) -> list[Part]:
    parts: list[Part] = []
    start = 0
    for ready in found.blocks:
        try:
            num_bytes = Path(ready.path).stat().st_size
        except OSError:  # of a damaged job: what is before it can be seen
            break
        parts.append(Part(Path(ready.path), start, num_bytes))
        start += num_bytes
    if not parts:
        raise Refusal(404, f"video {found.job_id}: its blocks are not there any more", "gone")
    return parts


def _span(asked: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header; None where there is none that is understood."""
    match = RANGE.fullmatch(asked.replace(" ", "")) if asked else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        return (max(0, size - int(last)), size) if int(last) else (0, 0)
    stop = min(size, int(last) + 1) if last else size
    return None if last and int(last) < int(first) else (int(first), stop)


async def _bytes(parts: Sequence[Part], start: int, stop: int) -> AsyncIterator[bytes]:
    for part in parts:
        at, end = max(start, part.start), min(stop, part.start + part.num_bytes)
        while at < end:
            data = await to_thread.run_sync(_read, part.path, at - part.start, min(PIECE_BYTES, end - at))
            at += len(data)
            yield data


def _read(path: Path, at: int, num_bytes: int) -> bytes:
    try:
        with open(path, "rb") as opened:
            opened.seek(at)
            if data := opened.read(num_bytes):
                return data
    except OSError:
        pass
    raise CutShort(f"{path.name} has gone while it was sent")
