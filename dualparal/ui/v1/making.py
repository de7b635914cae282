"""The routes that make videos, tell of them and change what becomes of them. Their docstrings are their documentation."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dualparal.errors import OutputError, RequestError
from dualparal.presets import USUAL
from dualparal.ui.http.refusals import Refusal
from dualparal.ui.owners import address_of
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1.asked import asked
from dualparal.ui.v1.bodies import json_of
from dualparal.ui.v1.calls import Calls, video_id

STOP_WAIT_S = 30.0  # most block steps are shorter
MAX_LISTED = 100
POLL_HEADERS = {"openai-poll-after-ms": "1000"}
STEERED = ("prompt", "transition")


class Making:
    """What is asked for, and what is done with it."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self._studio, self._objects = calls, calls.studio, calls.objects

    async def create(self, request: Request) -> Response:
        """Queue a video and return at once. JSON, or a form with a picture to begin with, or a video to go on from, as
        `input_reference`. With `takes` the answer is the first of so many, and its `takes` lists the id of each: they rest at
        their first look until /resume."""
        owner, in_thread = self._calls.access.owner(request), self._calls.in_thread
        async with asked(request) as found:
            preset = await in_thread(self._preset, found.preset, found.model)
            made = await in_thread(lambda: self._objects.take(found.of_preset(preset), owner, address_of(request)))
        told = await in_thread(self._objects.video, made[0])
        return JSONResponse(told | ({"takes": [one.job_id for one in made]} if made[1:] else {}), headers=POLL_HEADERS)

    async def listed(self, request: Request) -> Response:
        """The caller's videos, a page of them."""
        owner = self._calls.access.owner(request)
        query = request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_LISTED):
            raise Refusal(400, f"limit is a number from 1 to {MAX_LISTED}", "invalid_value", param="limit")
        if order not in ("asc", "desc"):
            raise Refusal(400, "order is asc or desc", "invalid_value", param="order")
        return JSONResponse(await self._calls.in_thread(self._page, owner, query.get("after"), int(limit), order == "asc"))

    async def retrieve(self, request: Request) -> Response:
        """Where a video stands: status, progress, finished blocks with their addresses, settings, timings."""
        found = await self._calls.mine(request)
        return JSONResponse(await self._calls.in_thread(self._objects.video, found), headers=POLL_HEADERS)

    async def takes(self, request: Request) -> Response:
        """The takes that a video belongs with, itself among them, in their order; itself alone where it is none."""
        found, owner = await self._calls.mine(request), self._calls.access.owner(request)
        takes = await self._calls.in_thread(self._studio.takes, found.job_id, owner)
        return JSONResponse(_list([self._objects.brief(one) for one in takes]))

    async def cancel(self, request: Request) -> Response:
        """Stop a queued or running video at its next block step; its finished blocks stay and are its content."""
        found = await self._calls.mine(request)
        await self._calls.in_thread(self._studio.cancel, found.job_id, self._calls.access.owner(request))
        return await self._now(found, request)

    async def resume(self, request: Request) -> Response:
        """Go on with a video that was stopped, failed, was cut off or is a take that rests, from its last saved sweep and to
        the same bits."""
        found, owner = await self._calls.mine(request), self._calls.access.owner(request)
        made = await self._calls.in_thread(self._studio.resume, found.job_id, owner, address_of(request))
        return JSONResponse(await self._calls.in_thread(self._objects.video, made), headers=POLL_HEADERS)

    async def steer(self, request: Request) -> Response:
        """Show another prompt from here on, in place of all that was to come in a running video: with the first block that has
        not entered the pipeline. Waits until it is known which; `steered` has that `block` and the second `from_s` of the film
        that it begins at."""
        found, owner = await self._calls.mine(request), self._calls.access.owner(request)
        values = await json_of(request)
        for name in values:
            if name not in STEERED:
                raise Refusal(
                    400, f"{name[:60]} is not a field here; give prompt and transition", "invalid_value", param=name[:60]
                )
        prompt, transition = values.get("prompt"), values.get("transition")
        told = await self._calls.in_waiting(found, self._studio.steer, found.job_id, prompt, transition, owner)
        return await self._now(found, request, steered={"block": told.block, "from_s": told.from_s, "notice": told.notice})

    async def finish(self, request: Request) -> Response:
        """Wrap up a running film that was asked for with `is_endless`: blocks under way are completed, and it ends there."""
        found, owner = await self._calls.mine(request), self._calls.access.owner(request)
        await self._calls.in_waiting(found, self._studio.finish, found.job_id, owner)
        return await self._now(found, request)

    async def delete(self, request: Request) -> Response:
        """Remove a video with all its files; one that is queued or runs is stopped first. If that takes longer than half a
        minute the answer is 202 with `deleted` false: ask again."""
        owner, job_id = self._calls.access.owner(request), video_id(request)
        try:
            found = await self._calls.in_thread(self._calls.find, job_id, request)
        except OutputError:  # its record is damaged, and it is the caller's
            found = None
        if found is not None and not found.is_ended:
            await self._calls.in_thread(self._studio.cancel, job_id, owner)
            found = await self._calls.until(found, owner, lambda one: one.is_ended, STOP_WAIT_S)
            if not found.is_ended:
                return JSONResponse(_deleted(job_id, False), status_code=202)
        await self._calls.in_thread(self._studio.delete, job_id, owner)
        return JSONResponse(_deleted(job_id, True))

    async def models(self, request: Request) -> Response:
        """What `model` may be: the presets of the model that is loaded here."""
        self._calls.access.owner(request)
        data = [
            {"id": preset.name, "object": "model", "created": 0, "owned_by": "dualparal", "title": preset.title}
            for preset in self._studio.usable_presets()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _now(self, found: Snapshot, request: Request, **more: Any) -> Response:
        return JSONResponse(
            await self._calls.in_thread(lambda: self._objects.video(self._calls.find(found.job_id, request)) | more)
        )

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
        return _list(data, last_id=ids[:limit][-1] if ids else None, has_more=len(ids) > limit)


def _list(data: list[dict[str, Any]], last_id: str | None = None, has_more: bool = False) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": last_id or (data[-1]["id"] if data else None)}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def _deleted(job_id: str, is_gone: bool) -> dict[str, Any]:
    return {"id": job_id, "object": "video.deleted", "deleted": is_gone}
