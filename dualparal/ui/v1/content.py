"""The bytes of a video: the mp4 once the job has ended, before that the finished blocks as one MPEG-TS stream that grows.

What was there of the stream stays as it is, so a client that asks for the range behind what it has goes on where it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dualparal.files import is_file
from dualparal.media.writer import thumbnail
from dualparal.ui.guard import CutShort
from dualparal.ui.http.refusals import RETRY_S, Refusal
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1.ranges import FRESH, PIECE_BYTES, FileAnswer, behind_the_end, read_at, span

TS, MP4, JPEG = "video/mp2t", "video/mp4", "image/jpeg"


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
        return FileAnswer(found.video, MP4, filename=f"dualparal-{found.job_id}.mp4")
    if kind == "mp4" or not found.blocks:
        what = "no block of it was finished" if found.is_ended else "no block of it is finished yet; ask again"
        if kind == "mp4" and not found.is_ended:
            what = "the mp4 is made when the video has ended; leave format out for the finished blocks"
        raise Refusal(404, f"video {found.job_id}: {what}", "not_ready", headers={"Retry-After": RETRY_S})
    return _stream(found, request)


def picture(found: Snapshot) -> Response:
    """The first picture as a JPEG, made when it is asked for first. Raises `Refusal`, `OutputError`."""
    target = found.folder.path / "poster.jpg"
    if not is_file(target):
        source = found.video or (Path(found.blocks[0].path) if found.blocks else None)
        if source is None:
            raise Refusal(
                404, f"video {found.job_id}: no block of it is finished yet", "not_ready", headers={"Retry-After": RETRY_S}
            )
        thumbnail(source, target)
    return FileAnswer(target, JPEG)


def segment(found: Snapshot, block: int) -> Response:
    """One finished block, MPEG-TS. Raises `Refusal`."""
    path = next((Path(ready.path) for ready in found.blocks if ready.block == block), None)
    if path is None or not is_file(path):
        raise Refusal(404, f"video {found.job_id}: block {block} is not finished", "not_ready")
    return FileAnswer(path, TS)


def rough_block(found: Snapshot, block: int) -> Response:
    """How a block was last seen: a JPEG with a small picture for each latent frame, eight in a row. Raises `Refusal`."""
    path = found.folder.look / f"{block:04d}.jpg"
    if not is_file(path):
        raise Refusal(404, f"video {found.job_id}: block {block} has not been seen yet", "not_ready")
    return FileAnswer(path, JPEG, is_fresh=True)


def _stream(found: Snapshot, request: Request) -> Response:
    """The finished blocks behind one another, or the range of them that is asked for."""
    parts = _parts(found)
    size = parts[-1].start + parts[-1].num_bytes
    tag = f'"{found.job_id}-ts"'
    headers = {"Accept-Ranges": "bytes", "ETag": tag, **FRESH}
    asked = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
    part = span(asked, size)
    total = str(size) if found.is_ended else "*"
    if part is not None and not part[0] < part[1]:
        raise behind_the_end(size, headers)
    start, stop = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
    headers["Content-Length"] = str(stop - start)
    body = _bytes(parts, start, stop) if request.method != "HEAD" else iter(())
    return StreamingResponse(body, status_code=200 if part is None else 206, media_type=TS, headers=headers)


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
            return read_at(opened, at, num_bytes)
    except OSError:
        raise CutShort(f"{path.name} has gone while it was sent") from None
