"""One job as the page and the API show it, the same whether it is running here or was found on disk after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.errors import OutputError, RequestError
from dualparal.events import BlockReady, Cancelled, Finished, Look, Progress, Started
from dualparal.files import is_file
from dualparal.jobs.facts import created_s, read_history
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import ENDED, History, Standing
from dualparal.jobs.takes import from_record as take_from_record
from dualparal.jobs.timeline import read_timeline
from dualparal.messages import Span, Take
from dualparal.request import Settings

if TYPE_CHECKING:
    from dualparal.jobs.job import Job


@dataclass(frozen=True, kw_only=True)
class Snapshot(Standing):
    """What is known of a job now: its request, its history, and `state`, one of `jobs.history.STATES`."""

    job_id: str
    request: Settings
    owner: str
    folder: JobFolder
    progress: Progress | None = None
    created_s: float = 0.0
    is_baseline: bool = False  # plain Wan makes it, for comparison
    take: Take | None = None  # it is one of several
    looks: Mapping[int, Look] = field(default_factory=dict)  # the newest of each block, while it is in memory

    @property
    def started(self) -> Started | None:
        return self.history.started

    @property
    def is_resting(self) -> bool:
        """Whether it is a take that has come to its first look and waits to be chosen."""
        return isinstance(self.final, Cancelled) and self.final.is_resting

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED

    @property
    def video(self) -> Path | None:
        """The playable mp4 of what was finished, once the job has ended."""
        return self.folder.video if self.is_ended and is_file(self.folder.video) else None

    @property
    def can_go_on(self) -> bool:
        """Whether another film can continue this one."""
        return self.video is not None and is_file(self.folder.end)

    @property
    def num_frames(self) -> int:
        """Frames finished so far."""
        return self.history.num_frames

    @property
    def timings(self) -> dict[str, float]:
        return self.final.timings if isinstance(self.final, Finished) else {}

    @property
    def spans(self) -> tuple[Span, ...]:
        """When each stage worked; read from the disk, and long."""
        return read_timeline(self.folder.path) if self.is_ended else ()

    @property
    def made_in_s(self) -> float | None:
        """Seconds that a finished video took, over all its runs and without waiting; None where nothing tells."""
        return (self.history.worked_s or self.timings.get("total_s")) if self.state == "finished" else None


def of_job(job: Job) -> Snapshot:
    """A job of this run of the engine. Reads nothing from the disk."""
    view = job.view()
    return Snapshot(
        job_id=job.id, request=job.request, owner=job.owner, state=view.state, folder=job.folder, history=view.history,
        progress=view.progress, created_s=job.created_s, is_baseline=job.is_baseline,
        looks=view.looks, take=job.run.take,
    )  # fmt: skip


def of_folder(folder: JobFolder) -> Snapshot:
    """A job of an earlier run, or of another program, from its files. Raises `OutputError` when `request.json` is not
    usable; a damaged journal costs what it told."""
    record = folder.record()
    try:
        request = folder.request()
    except RequestError as error:
        raise OutputError(str(error)) from None
    try:
        history, state = read_history(folder)
    except OutputError:
        history, state = History(), "interrupted"
    return Snapshot(
        job_id=folder.job_id, request=request, owner=str(record.get("owner") or ""), folder=folder, state=state,
        history=replace(history, blocks=tuple(_here(folder, block) for block in history.blocks)),
        created_s=created_s(record), is_baseline=bool(record.get("baseline")), take=take_from_record(record),
    )  # fmt: skip


def _here(folder: JobFolder, block: BlockReady) -> BlockReady:
    """The folder may have moved, and no journal leads to another."""
    return replace(block, path=str(folder.path / Path(block.path).name))
