"""A job as OpenAI's video object, with what the page's API tells of it beside."""

from __future__ import annotations

from typing import Any

from dualparal.events import Failed, Finished
from dualparal.ui.api import Calls
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1.asked import Asked
from dualparal.ui.v1.keys import LINK, Access
from dualparal.ui.words import without_paths

STATUS = {"queued": "queued", "running": "in_progress", "finished": "completed"}  # all others are "failed"
NOT_TOLD = ("job_id", "error", "progress")  # of the API's status; they have other names here


class Objects(Calls):
    """Makes them, and takes requests as the page's API does; `root` is the server's path behind a proxy."""

    def __init__(self, access: Access, root: str = "") -> None:
        super().__init__(access.studio)
        self._access, self._root = access, root

    def take(self, asked: Asked, owner: str, address: str) -> list[Snapshot]:
        """Queue what is asked for, within the limits of `owner` and `address`: one video or its takes. Raises
        `DualParalError`."""
        request = self._request(dict(asked.fields))
        if (request.takes or 1) > 1:
            return self.studio.submit_takes(request, request.takes, asked.preset, owner=owner, address=address)
        return [self.studio.submit(request, asked.preset, owner=owner, address=address)]

    def video(self, found: Snapshot) -> dict[str, Any]:
        """The whole object."""
        told = {name: value for name, value in self._status(found).items() if name not in NOT_TOLD}
        told["blocks"] = [{**block, "url": self.url(found, f"segments/{block['block']}.ts")} for block in told["blocks"]]
        return {**self.brief(found), **told}

    def brief(self, found: Snapshot) -> dict[str, Any]:
        """What OpenAI's object has, and where the contents are."""
        request, final = found.request, found.final
        return {
            "id": found.job_id,
            "object": "video",
            "model": request.model,
            "status": status_of(found),
            "progress": progress_of(found),
            "created_at": int(found.created_s),
            "completed_at": int(final.time_s) if isinstance(final, Finished) else None,
            "expires_at": None,
            "prompt": request.all_text,
            "size": f"{request.width}x{request.height}",
            "seconds": f"{request.num_frames / request.fps:g}",
            "remixed_from_video_id": None,
            "continue_from": request.continue_from,
            "take": found.take.number + 1 if found.take else None,
            "error": error_of(found),
            "content_url": self.url(found, "content"),
            "events_url": self.url(found, "events"),
            "live_url": self.url(found, "live.m3u8"),
        }

    def url(self, found: Snapshot, name: str) -> str:
        """The address, from this server's root on, of something of a video, for whoever has no key to send."""
        return f"{self._root}/v1/videos/{found.job_id}/{name}?{LINK}={self._access.link(found.job_id)}"


def status_of(found: Snapshot) -> str:
    """queued, in_progress, completed or failed (stopped and cut off ones too)."""
    return STATUS.get(found.state, "failed")


def progress_of(found: Snapshot) -> int:
    """Percent of the block steps; 100 for a finished video alone."""
    if found.state == "finished":
        return 100
    return min(99, int(100 * found.progress.items_done / found.progress.num_items)) if found.progress else 0


def error_of(found: Snapshot) -> dict[str, str] | None:
    """Why there is no whole video; None while there may be one."""
    if isinstance(found.final, Failed):
        return {"code": found.final.kind, "message": without_paths(found.final.message)}
    if found.is_resting:
        return {"code": "resting", "message": "it is a take that rests at its first look; resume the one that you choose"}
    if found.state == "cancelled":
        return {"code": "cancelled", "message": f"it was stopped after {found.num_frames} frames, which are its content"}
    if found.state == "interrupted":
        return {"code": "interrupted", "message": "it was cut off, and can be resumed"}
    return None
