"""A video's progress as server-sent events: told when something changes, gone on with by `Last-Event-ID`. Follows the HTML
standard's event streams.

An event's id says what had been told by then: blocks, block steps done, and when the last look was taken. So a client that
comes back is told of no block twice and of none too few, also by a server that was started anew; of progress and looks it gets
the newest.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from dualparal.errors import DualParalError
from dualparal.ui import throttle
from dualparal.ui.http.refusals import RETRY_S, Refusal
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.v1.objects import Objects, progress_of, status_of
from dualparal.ui.watch import LOOK_EVERY_S, TELL_EVERY_S, look

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
PLACE = re.compile(r"([0-9]{1,9})\.([0-9]{1,12})\.([0-9]{1,15})")
END = "end"  # the id of the last event
BEAT_S = 15.0  # without a word a proxy hangs up
RETRY_MS = 2000
MAX_FOLLOWERS = 1024
_num_followers = 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """What has been told: so many blocks, progress at so many block steps, looks up to a moment (ms since the epoch)."""

    num_blocks: int = 0
    items_done: int = -1
    look_ms: int = 0

    def __str__(self) -> str:
        return f"{self.num_blocks}.{max(0, self.items_done)}.{self.look_ms}"

    @classmethod
    def read(cls, text: str | None) -> Place | None:
        """The place that an id names, the beginning where it names none; None after the last event."""
        if text == END:
            return None
        match = PLACE.fullmatch(text or "")
        return cls(num_blocks=int(match[1]), look_ms=int(match[3])) if match else cls()


def check_room() -> None:
    """Raise `Refusal` where as many follow as may."""
    if _num_followers >= MAX_FOLLOWERS:
        raise Refusal(503, "many follow videos here now; try again", "busy", headers={"Retry-After": RETRY_S})


async def told(studio: Studio, objects: Objects, job_id: str, owner: str, place: Place) -> AsyncIterator[bytes]:
    """The events of a video behind `place`, until it has ended or is gone."""
    global _num_followers
    _num_followers += 1
    try:
        with throttle.follower() as pause_s:
            yield f"retry: {RETRY_MS}\n\n".encode()
            silent_s, waited_s, stood = 0.0, TELL_EVERY_S, None
            while True:
                try:
                    found = await look(studio, job_id, owner)
                except DualParalError:
                    yield _event("gone", {"id": job_id}, END)
                    return
                stands = (found.state, found.position)
                is_due = found.is_ended or stands != stood or waited_s >= max(TELL_EVERY_S, pause_s())
                events, place = news(found, objects, place, is_due=is_due, has_moved=stands != stood)
                for event in events:
                    yield event
                if found.is_ended:
                    yield _event(status_of(found), await asyncio.to_thread(objects.video, found), END)
                    return
                stood, waited_s = stands, 0.0 if is_due else waited_s + LOOK_EVERY_S
                silent_s = 0.0 if events else silent_s + LOOK_EVERY_S
                if silent_s >= BEAT_S:
                    yield b": \n\n"
                    silent_s = 0.0
                await asyncio.sleep(LOOK_EVERY_S)
    finally:
        _num_followers -= 1


def news(
    found: Snapshot, objects: Objects, place: Place, *, is_due: bool = True, has_moved: bool = False
) -> tuple[list[bytes], Place]:
    """What there is to tell behind `place`, and the place after it: blocks at once, the rest when it `is_due`; `has_moved`: the
    job begins, or comes nearer in the queue."""
    events: list[bytes] = []
    for ready in found.blocks[place.num_blocks :]:
        place = replace(place, num_blocks=place.num_blocks + 1)
        block = {"block": ready.block, "first_frame": ready.first_frame, "num_frames": ready.num_frames}
        address = objects.url(found, f"segments/{ready.block}.ts")
        events.append(_event("block", {**block, "duration_s": ready.duration_s, "url": address}, str(place)))
    if not is_due or found.is_ended:
        return events, place
    for number, seen in sorted(found.looks.items(), key=lambda pair: pair[1].time_s):
        if (taken_ms := int(seen.time_s * 1000)) > place.look_ms:
            place = replace(place, look_ms=taken_ms)
            where = objects.url(found, f"looks/{number}.jpg")
            told = {"block": number, "step": seen.step, "num_steps": seen.num_steps, "num_pictures": seen.num_pictures}
            events.append(_event("look", {**told, "url": f"{where}&step={seen.step}"}, str(place)))
    items_done = found.progress.items_done if found.progress else 0
    if items_done != place.items_done or has_moved:
        place = replace(place, items_done=items_done)
        events.append(_event("progress", _progress(found), str(place)))
    return events, place


def _progress(found: Snapshot) -> dict[str, Any]:
    progress = found.progress
    return {
        "status": status_of(found),
        "progress": progress_of(found),
        "position": found.position,
        "items_done": progress.items_done if progress else 0,
        "num_items": progress.num_items if progress else found.started.num_items if found.started else None,
        "block_steps": list(progress.block_steps) if progress else [],
        "eta_s": progress.eta_s if progress else None,
        "num_frames": found.request.num_frames,
        "num_frames_ready": found.num_frames,
    }


def _event(name: str, data: dict[str, Any], place: str) -> bytes:
    """One event; JSON has no line ends of its own."""
    return f"event: {name}\nid: {place}\ndata: {json.dumps(data)}\n\n".encode()
