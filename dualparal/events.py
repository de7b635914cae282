"""What a job tells its caller, in order: Queued, Started, then Progress and BlockReady, then one final event.

Frozen, picklable and JSON-friendly: they cross process borders and are appended to `events.jsonl`. `time_s` is seconds since
the epoch. Exactly one of Finished, Failed, Cancelled ends a job.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; `job_id` names the job."""

    job_id: str
    time_s: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary with the event's class name under `event`."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Queued(Event):
    """Waiting; `position` jobs are ahead (0 = next to run), or for what `reason` says."""

    position: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Rank 0 has taken the job. `num_items` block steps will be run for `num_blocks` blocks, `num_frames` frames promised."""

    num_blocks: int
    num_items: int
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Where the run stands, at most a few times a second. `block_steps[b]` denoising steps of block b are done (of
    `num_steps`); `busy[r]` is the share of the last seconds in which stage r computed (0-1); `eta_s` is None while unknown."""

    items_done: int
    num_items: int
    num_steps: int
    block_steps: tuple[int, ...]
    eta_s: float | None = None
    busy: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockReady(Event):
    """Block `block` is decoded: `path` is its playable MPEG-TS segment, frames `[first_frame, first_frame + num_frames)`."""

    block: int
    path: str
    first_frame: int
    num_frames: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """Cut off (`kind` and `message` as in `Failed`), but not ended: it is queued again and goes on from its last saved sweep.
    Blocks already told of are not told of again."""

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """All done. `timings` in seconds: text_s, denoise_s, decode_s, encode_s, total_s, first_frames_s (from submit)."""

    path: str
    num_frames: int
    timings: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """Ended by an error: `kind` is the class name in `dualparal.errors`, `message` one sentence. `path` is the mp4 of the
    finished blocks, if any."""

    kind: str
    message: str
    path: str | None = None
    num_frames: int = 0


@dataclass(frozen=True, kw_only=True)
class Cancelled(Event):
    """Stopped on request. `path` is the mp4 of the `num_frames` finished frames, or None when no block was finished."""

    path: str | None = None
    num_frames: int = 0


FINAL = (Finished, Failed, Cancelled)
_BY_NAME = {cls.__name__: cls for cls in (Queued, Started, Progress, BlockReady, Interrupted, Finished, Failed, Cancelled)}


def event_from_json(record: dict[str, Any]) -> Event:
    """The inverse of `Event.to_json`; raises ValueError for an unknown event name."""
    record = dict(record)
    name = record.pop("event", None)
    if name not in _BY_NAME:
        raise ValueError(f"unknown event {name!r}; known: {', '.join(_BY_NAME)}")
    for key in ("block_steps", "busy"):
        if key in record:
            record[key] = tuple(record[key])
    return _BY_NAME[name](**record)
