"""What a job tells its caller, in order: Queued, Started, then Progress, BlockReady, Steered, WrappedUp, then one final event.

Frozen, picklable and JSON-friendly: they cross process borders and are appended to `events.jsonl`. `time_s` is seconds since
the epoch by a clock that may be set; `worked_s` by one that is not. Exactly one of Finished, Failed, Cancelled ends a job.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter


def _now_s() -> float:
    return time.time()


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; `job_id` names the job. `worked_s`: seconds that the job had been worked on until then, over all its
    runs and without what lay between them; None in events that no front end has noted."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False, extra="forbid")  # of what comes from disk

    job_id: str
    time_s: float = field(default_factory=_now_s)
    worked_s: float | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary with the event's class name under `event`."""
        found = {"event": type(self).__name__, **dataclasses.asdict(self)}
        if self.worked_s is None:
            del found["worked_s"]
        return found


@dataclass(frozen=True, kw_only=True)
class Queued(Event):
    """Waiting; `position` jobs are ahead (0 = next to run), or for what `reason` says. `owner`: whose job it is, in case its
    record is damaged one day."""

    position: int
    reason: str = ""
    owner: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Rank 0 has taken the job. `num_items` block steps will be run for `num_blocks` blocks, `num_frames` frames promised.

    Told again with a `notice`, one sentence, when there is something about the video that its maker should know.
    """

    num_blocks: int
    num_items: int
    num_frames: int
    notice: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Where the run stands, at most a few times a second. `block_steps[b]` denoising steps of block b are done (of
    `num_steps`); `busy[r]` is the share of the last seconds in which stage r computed (0-1); `eta_s` is None while unknown.
    `is_held`: an endless film is as far ahead of who watches it as its `lead` allows, and waits."""

    items_done: int
    num_items: int
    num_steps: int
    block_steps: tuple[int, ...]
    eta_s: float | None = None
    busy: tuple[float, ...] = ()
    is_held: bool = False


@dataclass(frozen=True, kw_only=True)
class Look(Event):
    """What block `block` is becoming, after `step` of `num_steps` (all: it is finished): `num_pictures` small pictures, one for
    each latent frame, in one JPEG, eight in a row. Only for those who ask for looks; on disk only the newest are kept."""

    block: int
    step: int
    num_steps: int
    num_pictures: int
    picture: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Without the picture."""
        return {name: value for name, value in super().to_json().items() if name != "picture"}


@dataclass(frozen=True, kw_only=True)
class BlockReady(Event):
    """Block `block` is decoded: `path` is its playable MPEG-TS segment, frames `[first_frame, first_frame + num_frames)`, and
    `checksum` that of the file."""

    block: int
    path: str
    first_frame: int
    num_frames: int
    duration_s: float
    checksum: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Steered(Event):
    """From `block` on, second `from_s` of the film, a new shot: its `prompt`, and how it begins. The counts are those of the
    film as it now will be, as in `Started`; `notice` says what of the text is left out."""

    block: int
    prompt: str
    transition: str
    from_s: float
    num_blocks: int
    num_items: int
    num_frames: int
    notice: str = ""


@dataclass(frozen=True, kw_only=True)
class WrappedUp(Event):
    """An endless film ends with the blocks that have entered; the counts are those of the film as it now will be, as in
    `Started`."""

    num_blocks: int
    num_items: int
    num_frames: int


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
    """Stopped on request. `path` is the mp4 of the `num_frames` finished frames, or None when no block was finished.
    `is_resting`: a take that has come to its first look; it goes on when it is resumed."""

    path: str | None = None
    num_frames: int = 0
    is_resting: bool = False


FINAL = (Finished, Failed, Cancelled)
_BY_NAME = {cls.__name__: cls for cls in (Queued, Started, Progress, BlockReady, Steered, WrappedUp, Interrupted, *FINAL)}


_READERS: dict[str, TypeAdapter[Any]] = {}  # made when first asked for: imports stay quick


def event_from_json(record: object) -> Event:
    """The inverse of `Event.to_json`; raises ValueError for an unknown event name and for values that are none of its."""
    name = record.get("event") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"unknown event {name!r}; known: {', '.join(_BY_NAME)}")
    if name not in _READERS:
        _READERS[name] = TypeAdapter(_BY_NAME[name])
    found: Event = _READERS[name].validate_python({key: value for key, value in record.items() if key != "event"})
    return found
