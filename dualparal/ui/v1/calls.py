"""What all routes of `/v1` need: the caller's video by its path, and threads for what would keep the event loop waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from dualparal.errors import RequestError
from dualparal.jobs.folder import JOB_ID
from dualparal.ui.http.refusals import RETRY_S, Refusal, not_found
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1.keys import Access
from dualparal.ui.v1.objects import Objects
from dualparal.ui.watch import look

T = TypeVar("T")
MAX_THREADS = 4  # as of an endpoint of the page's API
MAX_WAITS, MAX_WAITS_EACH = 32, 4  # for a running job's next block step, some minutes perhaps: of all videos, of one
LOOK_EVERY_S = 0.1


class Calls:
    """How a route gets the caller's video, and waits for what takes its time."""

    def __init__(self, access: Access, root: str = "") -> None:
        self.access, self.studio = access, access.studio
        self.objects = Objects(access, root)
        self._limiter: CapacityLimiter | None = None
        self._waiting: CapacityLimiter | None = None
        self._waits: Counter[str] = Counter()

    async def mine(self, request: Request) -> Snapshot:
        """The video in the path, if it is the caller's. Raises `Refusal`."""
        self.access.owner(request)
        return await self.in_thread(self.find, video_id(request), request)

    def find(self, job_id: str, request: Request) -> Snapshot:
        """The caller's video. Raises `Refusal`, `OutputError` where its record is damaged."""
        try:
            return self.studio.find(job_id, self.access.owner(request))
        except RequestError:
            raise not_found(job_id) from None

    async def readable(self, request: Request) -> Snapshot:
        """The video in the path, if the caller may read it. Raises `Refusal`."""
        job_id = video_id(request)
        return await self.looked(job_id, self.access.reader(request, job_id))

    async def looked(self, job_id: str, owner: str) -> Snapshot:
        """A video of `owner` as it stands now. Raises `Refusal`."""
        try:
            return await look(self.studio, job_id, owner)
        except RequestError:
            raise not_found(job_id) from None

    async def until(self, found: Snapshot, owner: str, is_there: Callable[[Snapshot], bool], timeout_s: float) -> Snapshot:
        """The video once it `is_there`, or as it stands after `timeout_s`. Raises `Refusal` when it goes away meanwhile."""
        for _ in range(round(timeout_s / LOOK_EVERY_S)):
            if is_there(found):
                break
            await asyncio.sleep(LOOK_EVERY_S)
            found = await self.looked(found.job_id, owner)
        return found

    async def in_thread(self, function: Callable[..., T], *values: Any) -> T:
        """What reads the disk or plans, a few at a time."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(MAX_THREADS)
        return await to_thread.run_sync(partial(function, *values), limiter=self._limiter)

    async def in_waiting(self, found: Snapshot, function: Callable[..., T], *values: Any) -> T:
        """What waits for a running job's workers, in a thread of its own. Raises `Refusal` where many wait already."""
        if self._waiting is None:
            self._waiting = CapacityLimiter(MAX_WAITS)
        if self._waits[found.job_id] >= MAX_WAITS_EACH or self._waits.total() >= MAX_WAITS:
            what = "many calls wait for the next block step now; try again"
            raise Refusal(503, what, "busy", headers={"Retry-After": RETRY_S})
        self._waits[found.job_id] += 1
        try:
            return await to_thread.run_sync(partial(function, *values), limiter=self._waiting)
        finally:
            self._waits[found.job_id] -= 1
            self._waits += Counter()  # forgets those of which none waits


def video_id(request: Request) -> str:
    """The id in the path. Raises `Refusal` for what can be none."""
    job_id = str(request.path_params["video_id"])
    if not JOB_ID.fullmatch(job_id):
        raise not_found(job_id)
    return job_id
