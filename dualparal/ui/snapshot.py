"""One job as the page and the API show it, the same whether it is running here or was found on disk after a restart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.errors import DualParalError
from dualparal.events import BlockReady, Cancelled, Event, Failed, Finished, Progress, Started
from dualparal.request import GenerationRequest
from dualparal.runtime.journal import JobFolder

if TYPE_CHECKING:
    from dualparal.runtime.job import Job

ENDED = ("finished", "failed", "cancelled", "interrupted")
_STATE_OF: dict[type, str] = {Finished: "finished", Failed: "failed", Cancelled: "cancelled"}


@dataclass(frozen=True)
class Span:
    """Stage `stage` worked on step `step` of block `block`; seconds since the job began."""

    stage: str
    start_s: float
    end_s: float
    block: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is known of a job now. `position` jobs are ahead of it; `state` is also "interrupted" after a crash."""

    job_id: str
    request: GenerationRequest
    owner: str
    state: str
    folder: JobFolder
    position: int = 0
    waits_for: str = ""
    started: Started | None = None
    progress: Progress | None = None
    blocks: tuple[BlockReady, ...] = ()
    final: Event | None = None
    spans: tuple[Span, ...] = ()
    created_s: float = 0.0

    @property
    def is_baseline(self) -> bool:
        """Whether plain Wan makes it, for comparison."""
        try:
            return bool(self.folder.record().get("baseline"))
        except DualParalError:
            return False

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED

    @property
    def video(self) -> Path | None:
        """The playable mp4 of what was finished, once the job has ended."""
        path = getattr(self.final, "path", None)
        if path and Path(path).is_file():
            return Path(path)
        return self.folder.video if self.is_ended and self.folder.video.is_file() else None

    @property
    def num_frames(self) -> int:
        """Frames finished so far."""
        return sum(block.num_frames for block in self.blocks)

    @property
    def timings(self) -> dict[str, float]:
        return self.final.timings if isinstance(self.final, Finished) else {}


def of_job(job: Job) -> Snapshot:
    """A job of this run of the engine."""
    view = job.view()
    spans = _spans(view.timeline) if view.final else ()
    if view.final and not spans:
        spans = read_timeline(job.folder)
    return Snapshot(
        job_id=job.id, request=job.request, owner=job.owner, state=view.state, folder=job.folder, position=view.position or 0,
        waits_for=view.waits_for,
        started=view.started, progress=view.progress, blocks=view.blocks, final=view.final, spans=spans,
    )  # fmt: skip


def of_folder(folder: JobFolder) -> Snapshot:
    """A job of an earlier run, from its files. Raises `DualParalError` when `request.json` is not readable."""
    record = folder.record()
    events = folder.events()
    final = folder.final_event()
    blocks = {event.block: event for event in events if isinstance(event, BlockReady)}  # a resumed job may repeat one
    try:
        request = GenerationRequest(**record["request"])
    except (KeyError, TypeError) as error:
        raise DualParalError(f"job {folder.job_id}: request.json is not usable ({error})") from None
    return Snapshot(
        job_id=folder.job_id, request=request, owner=str(record.get("owner") or ""), folder=folder,
        state=_STATE_OF[type(final)] if final else "interrupted", final=final,
        started=next((event for event in reversed(events) if isinstance(event, Started)), None),
        blocks=tuple(blocks[number] for number in sorted(blocks)), spans=read_timeline(folder),
        created_s=float(record.get("created_s") or 0.0),
    )  # fmt: skip


def read_timeline(folder: JobFolder) -> tuple[Span, ...]:
    """The spans in `timeline.json`; () when it is missing or damaged."""
    try:
        return _spans(json.loads((folder.path / "timeline.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return ()


def _spans(found: Any) -> tuple[Span, ...]:
    """Spans from dataclasses, dictionaries or a dictionary that holds them under `spans`."""
    if isinstance(found, dict):
        found = found.get("spans", ())
    names = Span.__dataclass_fields__
    records = (item if isinstance(item, dict) else {name: getattr(item, name) for name in names} for item in found)
    return tuple(Span(**{name: record[name] for name in names}) for record in records)
