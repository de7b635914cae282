"""The routes that show videos: bytes, pictures, events, the playlist. Their docstrings are their documentation."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dualparal.ui.http.refusals import RETRY_S, Refusal
from dualparal.ui.v1 import content, events, live
from dualparal.ui.v1.calls import Calls
from dualparal.ui.v1.ranges import FRESH, FileAnswer


class Watching:
    """What can be seen of a video, also while it is made."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def content(self, request: Request) -> Response:
        """The video's bytes, whole or a `Range` of them. While it runs: its finished blocks, an MPEG-TS stream that grows, so
        that the range behind what one has is what came since."""
        found = await self._calls.readable(request)
        variant = request.query_params.get("variant", "video")
        if variant == "video":
            return await self._calls.in_thread(content.video, found, request, request.query_params.get("format"))
        if variant == "thumbnail":
            return await self._calls.in_thread(content.picture, found)
        if variant != "look":
            raise Refusal(400, "variant is video, thumbnail or look", "invalid_value", param="variant")
        if (path := await self._calls.in_thread(self._calls.studio.look, found)) is None:
            raise Refusal(404, f"video {found.job_id}: nothing can be seen of it yet", "not_ready")
        return FileAnswer(path, "image/webp", is_fresh=True)

    async def segment(self, request: Request) -> Response:
        """One finished block as MPEG-TS."""
        found = await self._calls.readable(request)
        return await self._calls.in_thread(content.segment, found, _number(request))

    async def look(self, request: Request) -> Response:
        """How a block was last seen: one JPEG with a small picture for each latent frame, eight in a row."""
        found = await self._calls.readable(request)
        return await self._calls.in_thread(content.rough_block, found, _number(request))

    async def events(self, request: Request) -> Response:
        """Progress, finished blocks with their segment's address and early looks as server-sent events, at last the video under
        its status. `Last-Event-ID` goes on where an earlier stream broke off; after its end the answer is 204."""
        calls, found = self._calls, await self._calls.readable(request)
        place = events.Place.read(request.headers.get("last-event-id") or request.query_params.get("last_event_id"))
        if place is None:
            return Response(status_code=204)
        if request.method == "HEAD":  # it would be told to nobody, until the video has ended
            return StreamingResponse(iter(()), media_type=events.MEDIA_TYPE, headers=events.HEADERS)
        events.check_room()
        told = events.told(calls.studio, calls.objects, found.job_id, calls.access.reader(request, found.job_id), place)
        return StreamingResponse(told, media_type=events.MEDIA_TYPE, headers=events.HEADERS)

    async def live(self, request: Request) -> Response:
        """The finished blocks as an HLS playlist that grows until the video has ended, for any player. Before the first block
        it waits for it some seconds, then 503 with `Retry-After`."""
        found, calls = await self._calls.readable(request), self._calls
        owner = calls.access.reader(request, found.job_id)
        found = await calls.until(found, owner, lambda one: bool(one.blocks) or one.is_ended, live.FIRST_BLOCK_S)
        if not found.blocks:
            code, status = ("not_ready", 404) if found.is_ended else ("busy", 503)
            what = "no block of it was finished" if found.is_ended else "no block of it is finished yet; ask again"
            raise Refusal(status, f"video {found.job_id}: {what}", code, headers={"Retry-After": RETRY_S})
        text = live.playlist(found, calls.access.link(found.job_id))
        return Response(text, media_type=live.MEDIA_TYPE, headers=FRESH)


def _number(request: Request) -> int:
    text = str(request.path_params["block"])
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Refusal(404, "a block is a number from 0 on", "not_ready", param="block")
    return int(text)
