"""The routes below `/v1`, one table of them, and what each answers. `openapi` describes the same table.

Every route asks `Access` first; what may be asked for, how much and how often, is decided by the studio and the engine, as for
the page.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router
from starlette.types import Receive, Scope, Send

from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.jobs.folder import JOB_ID
from dualparal.presets import USUAL
from dualparal.ui.http.refusals import RETRY_S, Refusal, not_found, refusal_of, refused
from dualparal.ui.owners import address_of
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1 import content, events, live
from dualparal.ui.v1.asked import asked
from dualparal.ui.v1.keys import Access
from dualparal.ui.v1.objects import Objects
from dualparal.ui.v1.openapi import described, page
from dualparal.ui.watch import look

log = logging.getLogger(__name__)
T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
MAX_THREADS = 4  # as of an endpoint of the page's API
STOP_WAIT_S = 30.0  # most block steps are shorter
LOOK_EVERY_S = 0.1
MAX_LISTED = 100
POLL_HEADERS = {"openai-poll-after-ms": "1000"}
FAULT = "something went wrong inside the server; its log has the details"


@dataclass(frozen=True, kw_only=True)
class Door:
    """One route: its path below `/v1`, its method, what it answers with, its query's parameters by name."""

    method: str
    path: str
    call: Endpoint
    gives: str
    query: Mapping[str, str] = field(default_factory=dict)
    is_open: bool = False  # needs no key

    @property
    def about(self) -> str:
        """What it does, as its function's docstring says."""
        return " ".join((inspect.getdoc(self.call) or "").split())


class Videos:
    """What the routes do. Their docstrings are their documentation."""

    def __init__(self, access: Access, root: str = "") -> None:
        self._access, self._studio = access, access.studio
        self._objects = Objects(access, root)
        self._limiter: CapacityLimiter | None = None
        self._waiting: CapacityLimiter | None = None  # of those that wait for the next block step, some minutes perhaps

    def doors(self) -> list[Door]:
        """All routes."""
        link = {"link": "in place of a key: what the addresses in a video object carry"}
        return [
            Door(method="POST", path="/videos", call=self.create, gives="Video"),
            Door(method="GET", path="/videos", call=self.listed, gives="VideoList", query={
                "after": "id of the last video of the page before", "limit": f"1 to {MAX_LISTED}, 20 if left out",
                "order": "desc (newest first) or asc",
            }),
            Door(method="GET", path="/videos/{video_id}", call=self.retrieve, gives="Video"),
            Door(method="DELETE", path="/videos/{video_id}", call=self.delete, gives="Deleted"),
            Door(method="POST", path="/videos/{video_id}/cancel", call=self.cancel, gives="Video"),
            Door(method="POST", path="/videos/{video_id}/resume", call=self.resume, gives="Video"),
            Door(method="POST", path="/videos/{video_id}/finish", call=self.finish, gives="Video"),
            Door(method="GET", path="/videos/{video_id}/content", call=self.content, gives="video", query={
                "variant": "video, thumbnail (JPEG) or look (the rough film so far, animated WebP)",
                "format": "mp4 or ts; left out: the mp4 if there is one, else the finished blocks as MPEG-TS", **link,
            }),
            Door(method="GET", path="/videos/{video_id}/segments/{block}.ts", call=self.segment, gives="segment", query=link),
            Door(method="GET", path="/videos/{video_id}/looks/{block}.jpg", call=self.look, gives="picture", query=link),
            Door(method="GET", path="/videos/{video_id}/events", call=self.events, gives="events", query={
                "last_event_id": "in place of the header Last-Event-ID", **link,
            }),
            Door(method="GET", path="/videos/{video_id}/live.m3u8", call=self.live, gives="playlist", query=link),
            Door(method="GET", path="/models", call=self.models, gives="ModelList"),
            Door(method="GET", path="/openapi.json", call=self.openapi, gives="OpenAPI", is_open=True),
            Door(method="GET", path="/docs", call=self.docs, gives="page", is_open=True),
        ]  # fmt: skip

    async def create(self, request: Request) -> Response:
        """Queue a video and return at once. JSON, or a form with a picture to begin with as `input_reference`."""
        owner = self._access.owner(request)
        async with asked(request) as found:
            preset = await self._in_thread(self._preset, found.preset, found.model)
            made = await self._in_thread(lambda: self._objects.take(found.of_preset(preset), owner, address_of(request)))
        return JSONResponse(await self._in_thread(self._objects.video, made), headers=POLL_HEADERS)

    async def listed(self, request: Request) -> Response:
        """The caller's videos, a page of them."""
        owner = self._access.owner(request)
        query = request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_LISTED):
            raise Refusal(400, f"limit is a number from 1 to {MAX_LISTED}", "invalid_value", param="limit")
        if order not in ("asc", "desc"):
            raise Refusal(400, "order is asc or desc", "invalid_value", param="order")
        return JSONResponse(await self._in_thread(self._page, owner, query.get("after"), int(limit), order == "asc"))

    async def retrieve(self, request: Request) -> Response:
        """Where a video stands: status, progress, finished blocks with their addresses, settings, timings."""
        found = await self._mine(request)
        return JSONResponse(await self._in_thread(self._objects.video, found), headers=POLL_HEADERS)

    async def cancel(self, request: Request) -> Response:
        """Stop a queued or running video at its next block step; its finished blocks stay and are its content."""
        found = await self._mine(request)
        await self._in_thread(self._studio.cancel, found.job_id, self._access.owner(request))
        return JSONResponse(await self._in_thread(lambda: self._objects.video(self._find(found.job_id, request))))

    async def resume(self, request: Request) -> Response:
        """Go on with a video that was stopped, failed or was cut off, from its last saved sweep and to the same bits."""
        found, owner = await self._mine(request), self._access.owner(request)
        made = await self._in_thread(self._studio.resume, found.job_id, owner, address_of(request))
        return JSONResponse(await self._in_thread(self._objects.video, made), headers=POLL_HEADERS)

    async def finish(self, request: Request) -> Response:
        """Wrap up a running film that was asked for with `is_endless`: blocks under way are completed, and it ends there."""
        found, owner = await self._mine(request), self._access.owner(request)
        if self._waiting is None:
            self._waiting = CapacityLimiter(MAX_THREADS)
        await to_thread.run_sync(self._studio.finish, found.job_id, owner, limiter=self._waiting)
        return JSONResponse(await self._in_thread(lambda: self._objects.video(self._find(found.job_id, request))))

    async def delete(self, request: Request) -> Response:
        """Remove a video with all its files; one that is queued or runs is stopped first. If that takes longer than half a
        minute the answer is 202 with `deleted` false: ask again."""
        owner, job_id = self._access.owner(request), _video_id(request)
        try:
            found = await self._in_thread(self._find, job_id, request)
        except OutputError:  # its record is damaged, and it is the caller's
            found = None
        if found is not None and not found.is_ended:
            await self._in_thread(self._studio.cancel, job_id, owner)
            for _ in range(round(STOP_WAIT_S / LOOK_EVERY_S)):
                await asyncio.sleep(LOOK_EVERY_S)
                if (found := await self._looked(job_id, owner)).is_ended:
                    break
            else:
                return JSONResponse(_deleted(job_id, False), status_code=202)
        await self._in_thread(self._studio.delete, job_id, owner)
        return JSONResponse(_deleted(job_id, True))

    async def content(self, request: Request) -> Response:
        """The video's bytes, whole or a `Range` of them. While it runs: its finished blocks, an MPEG-TS stream that grows, so
        that the range behind what one has is what came since."""
        found = await self._read(request)
        variant = request.query_params.get("variant", "video")
        if variant == "video":
            return await self._in_thread(content.video, found, request, request.query_params.get("format"))
        if variant == "thumbnail":
            return content.file(await self._in_thread(content.picture, found), request, media_type="image/jpeg")
        if variant != "look":
            raise Refusal(400, "variant is video, thumbnail or look", "invalid_value", param="variant")
        if (path := await self._in_thread(self._studio.look, found)) is None:
            raise Refusal(404, f"video {found.job_id}: nothing can be seen of it yet", "not_ready")
        return content.file(path, request, may_change=True, media_type="image/webp")

    async def segment(self, request: Request) -> Response:
        """One finished block as MPEG-TS."""
        return await self._in_thread(content.segment, await self._read(request), request, _number(request))

    async def look(self, request: Request) -> Response:
        """How a block was last seen: one JPEG with a small picture for each latent frame, eight in a row."""
        return await self._in_thread(content.rough_block, await self._read(request), request, _number(request))

    async def events(self, request: Request) -> Response:
        """Progress, finished blocks with their segment's address and early looks as server-sent events, at last the video under
        its status. `Last-Event-ID` goes on where an earlier stream broke off; after its end the answer is 204."""
        found = await self._read(request)
        place = events.Place.read(request.headers.get("last-event-id") or request.query_params.get("last_event_id"))
        if place is None:
            return Response(status_code=204)
        events.check_room()
        told = events.told(self._studio, self._objects, found.job_id, self._access.reader(request, found.job_id), place)
        return StreamingResponse(told, media_type=events.MEDIA_TYPE, headers=events.HEADERS)

    async def live(self, request: Request) -> Response:
        """The finished blocks as an HLS playlist that grows until the video has ended, for any player. Before the first block
        it waits for it some seconds, then 503 with `Retry-After`."""
        found = await self._read(request)
        owner = self._access.reader(request, found.job_id)
        for _ in range(round(live.FIRST_BLOCK_S / LOOK_EVERY_S)):
            if found.blocks or found.is_ended:
                break
            await asyncio.sleep(LOOK_EVERY_S)
            found = await self._looked(found.job_id, owner)
        if not found.blocks:
            code, status = ("not_ready", 404) if found.is_ended else ("busy", 503)
            what = "no block of it was finished" if found.is_ended else "no block of it is finished yet; ask again"
            raise Refusal(status, f"video {found.job_id}: {what}", code, headers={"Retry-After": RETRY_S})
        text = live.playlist(found, self._access.link(found.job_id))
        return Response(text, media_type=live.MEDIA_TYPE, headers=content.FRESH)

    async def models(self, request: Request) -> Response:
        """What `model` may be: the presets of the model that is loaded here."""
        self._access.owner(request)
        data = [
            {"id": preset.name, "object": "model", "created": 0, "owned_by": "dualparal", "title": preset.title}
            for preset in self._studio.usable_presets()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def openapi(self, _: Request) -> Response:
        """This description."""
        return JSONResponse(described(self.doors()))

    async def docs(self, _: Request) -> Response:
        """This page."""
        return HTMLResponse(page(self.doors()))

    def _preset(self, preset: Any, model: Any) -> Any:
        """The preset's name that `preset` or `model` stands for. Raises `Refusal`."""
        if model is None or model == "" or preset is not None:
            return preset
        if model == self._studio.resolve(USUAL).model:
            return None
        try:
            return self._studio.preset(model).name
        except RequestError:
            usable = ", ".join(one.name for one in self._studio.usable_presets())
            raise Refusal(400, f"model is not one of this server's: {usable}", "model_not_found", param="model") from None

    def _page(self, owner: str, after: str | None, limit: int, is_oldest_first: bool) -> dict[str, Any]:
        open_jobs = {found.job_id: found for found in self._studio.active(owner)}
        folders = {folder.job_id: folder for folder in self._studio.past(owner)}
        ids = sorted({*open_jobs, *folders}, reverse=not is_oldest_first)
        if after is not None:
            ids = [one for one in ids if (one > after if is_oldest_first else one < after)]
        data = []
        for one in ids[:limit]:
            found = open_jobs.get(one) or self._studio.readable(folders[one])
            if found is not None:  # damaged ones have nothing to tell
                data.append(self._objects.brief(found))
        page = {"object": "list", "data": data, "has_more": len(ids) > limit}
        return {**page, "first_id": data[0]["id"] if data else None, "last_id": ids[:limit][-1] if ids else None}

    async def _mine(self, request: Request) -> Snapshot:
        """The video in the path, if it is the caller's. Raises `Refusal`."""
        self._access.owner(request)
        return await self._in_thread(self._find, _video_id(request), request)

    def _find(self, job_id: str, request: Request) -> Snapshot:
        return self._found(job_id, self._access.owner(request))

    async def _read(self, request: Request) -> Snapshot:
        """The video in the path, if the caller may read it."""
        job_id = _video_id(request)
        return await self._looked(job_id, self._access.reader(request, job_id))

    async def _looked(self, job_id: str, owner: str) -> Snapshot:
        try:
            return await look(self._studio, job_id, owner)
        except RequestError:
            raise not_found(job_id) from None

    def _found(self, job_id: str, owner: str) -> Snapshot:
        try:
            return self._studio.find(job_id, owner)
        except RequestError:
            raise not_found(job_id) from None

    async def _in_thread(self, function: Callable[..., T], *values: Any) -> T:
        """What reads the disk or plans, a few at a time."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(MAX_THREADS)
        return await to_thread.run_sync(partial(function, *values), limiter=self._limiter)


class Answers:
    """The ASGI application below `/v1`: whatever goes wrong is a refusal in OpenAI's form."""

    def __init__(self, doors: list[Door]) -> None:
        routes = [Route(door.path, _answering(door.call), methods=[door.method]) for door in doors]
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            sentence = f"{scope['method']} does not go with this address" if error.status_code == 405 else str(error.detail)
            code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
            await refused(error.status_code, sentence, code, headers=error.headers)(scope, receive, send)


def mount(access: Access, root: str = "") -> Mount:
    """All of it as one route of the server, whose path behind a proxy is `root`."""
    return Mount("/v1", app=Answers(Videos(access, root).doors()))


def _answering(call: Endpoint) -> Endpoint:
    """`call`, whose errors become answers of one sentence."""

    async def answer(request: Request) -> Response:
        try:
            return await call(request)
        except Refusal as refusal:
            return refusal.answer()
        except DualParalError as error:
            return refusal_of(error).answer()
        except ClientDisconnect:
            return refused(400, "the body broke off", "invalid_request")
        except OSError as error:
            log.warning("a call of %s failed: %s", request.url.path[:100], error)
            return refused(503, f"a file could not be read or written: {error.strerror}", "no_storage")

    return answer


def _video_id(request: Request) -> str:
    job_id = str(request.path_params["video_id"])
    if not JOB_ID.fullmatch(job_id):
        raise not_found(job_id)
    return job_id


def _number(request: Request) -> int:
    text = str(request.path_params["block"])
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Refusal(404, "a block is a number from 0 on", "not_ready", param="block")
    return int(text)


def _deleted(job_id: str, is_gone: bool) -> dict[str, Any]:
    return {"id": job_id, "object": "video.deleted", "deleted": is_gone}
