"""What the page and the API share: one engine, its presets, and every action with the check that it is the caller's to take.

Knows no Gradio. All refusals are `DualParalError`s of one sentence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.errors import DualParalError, RequestError
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.runtime.claim import delete_job
from dualparal.runtime.journal import JobFolder, check_job_id, find_job, list_jobs
from dualparal.ui import owners, snapshot
from dualparal.ui.estimate import Estimate, Estimator
from dualparal.ui.snapshot import Snapshot

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine


@dataclass
class Studio:
    """An engine as its visitors meet it."""

    engine: Engine
    presets: dict[str, Preset] = field(default_factory=dict)
    device: str = "cpu"
    estimator: Estimator = field(init=False)

    def __post_init__(self) -> None:
        self.presets = {**self.presets, self.engine.preset.name: self.engine.preset}
        self.estimator = Estimator(self.engine)

    @property
    def outputs(self) -> Path:
        return self.engine.outputs

    def usable_presets(self) -> list[Preset]:
        """The engine's own preset first, then the others for the same model (other resolutions)."""
        own = self.engine.preset
        others = [p for p in self.presets.values() if p.model == own.model and p.name != own.name]
        return [own, *others]

    def preset(self, name: object) -> Preset:
        """The usable preset called `name`; None or '' is the engine's own. Raises `RequestError`."""
        if name is None or name == "":
            return self.engine.preset
        usable = {preset.name: preset for preset in self.usable_presets()}
        if isinstance(name, str) and name in usable:
            return usable[name]
        shown = repr(name if len(repr(name)) < 60 else "…")
        if isinstance(name, str) and name in self.presets:
            raise RequestError(
                f"preset={shown} is of another model than the one loaded here; use {' or '.join(usable)}", "preset"
            )
        near = difflib.get_close_matches(str(name)[:60], list(usable), n=1, cutoff=0.0)
        raise RequestError(f"preset={shown} is unknown; did you mean '{near[0]}'?", "preset")

    def resolve(self, request: GenerationRequest, preset_name: object = None) -> GenerationRequest:
        """The request with every field filled from the chosen preset and checked against its limits."""
        preset = self.preset(preset_name)
        if preset.name != self.engine.preset.name:
            request = request.resolve(preset, num_experts=self.engine.num_experts)
        return self.engine.resolve(request)

    def estimate(self, request: GenerationRequest, preset_name: object = None) -> Estimate:
        """What the resolved request will cost, before it is submitted."""
        return self.estimator.estimate(self.resolve(request, preset_name))

    def submit(self, request: GenerationRequest, preset_name: object = None, *, owner: str = "") -> Snapshot:
        """Queue a job; refuses with the number what cannot fit."""
        request = self.resolve(request, preset_name)
        refusal = self.estimator.estimate(request).refusal
        if refusal:
            raise RequestError(refusal)
        return snapshot.of_job(self.engine.submit(request, owner=owner))

    def find(self, job_id: object, owner: str = "") -> Snapshot:
        """The job, running or on disk. A job of somebody else is as unknown as one that never was."""
        name = check_job_id(job_id)
        job = self.engine.job(name)
        found = snapshot.of_job(job) if job is not None else snapshot.of_folder(find_job(self.outputs, name))
        if not owners.may_touch(owner, found.owner):
            raise RequestError(f"there is no job {name} in {self.outputs}", "job_id")
        return found

    def cancel(self, job_id: object, owner: str = "") -> Snapshot:
        """Stop a queued or running job; a job that has ended is left as it is."""
        found = self.find(job_id, owner)
        job = self.engine.job(found.job_id)
        if job is not None and not found.is_ended:
            job.cancel()
        return found

    def can_resume(self, found: Snapshot) -> bool:
        """Whether the job ended before its last block was made, so that it can go on from its last saved sweep."""
        return found.state in ("failed", "cancelled", "interrupted") and found.started is not None and not found.is_baseline

    def resume(self, job_id: object, owner: str = "") -> Snapshot:
        """Queue again a job that was stopped, failed or was cut off; it gives the bits it would have given."""
        found = self.find(job_id, owner)
        return snapshot.of_job(self.engine.resume(found.job_id))

    def can_compare(self, found: Snapshot) -> bool:
        """Whether plain Wan can be asked for the same video."""
        return found.state == "finished" and self.engine.can_compare and not found.is_baseline

    def compare(self, job_id: object, owner: str = "") -> Snapshot:
        """Queue the request of a finished job for plain Wan, in one pass over the whole video."""
        found = self.find(job_id, owner)
        if not self.can_compare(found):
            raise RequestError(
                f"job {found.job_id} cannot be compared: only finished videos of the model as it is can", "job_id"
            )
        return snapshot.of_job(self.engine.compare(found.request, owner=owner))

    def delete(self, job_id: object, owner: str = "") -> None:
        """Remove an ended job and its files."""
        found = self.find(job_id, owner)
        if not found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; stop it before deleting it", "job_id")
        if (job := self.engine.job(found.job_id)) is not None:
            job.release()  # a full disk has not taken its end: deleting it may be what makes room
        delete_job(found.folder)

    def active(self, owner: str) -> list[Snapshot]:
        """The owner's queued and running jobs, in the order they will run."""
        return [snapshot.of_job(job) for job in self.engine.jobs() if owner and job.owner == owner]

    def past(self, owner: str) -> Iterator[Snapshot]:
        """The owner's ended jobs, newest first, read lazily."""
        running = {job.id for job in self.engine.jobs()}
        for folder in list_jobs(self.outputs):
            if owner and folder.job_id not in running and (found := _readable(folder, owner)) is not None:
                yield found

    def starts_in_s(self, job_id: str) -> float | None:
        """Seconds until the queued job `job_id` is expected to start, or None while nothing is known."""
        total_s = 0.0
        for job in self.engine.jobs():
            if job.id == job_id:
                return total_s
            progress = job.view().progress
            left_s = progress.eta_s if progress else self.estimator.time_s(job.request)
            if left_s is None:
                return None
            total_s += left_s
        return None

    def settings(self, found: Snapshot) -> dict[str, Any]:
        """The resolved request as a plain dictionary."""
        return found.request.model_dump(exclude_none=True)


def _readable(folder: JobFolder, owner: str) -> Snapshot | None:
    """The job if it is `owner`'s; None for those of others, and for a folder cut off while it was made or being deleted."""
    try:
        return snapshot.of_folder(folder) if folder.record().get("owner") == owner else None
    except (DualParalError, OSError):
        return None
