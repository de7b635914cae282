"""What the page and the API share: one engine, its presets, and every action with the check that it is the caller's to take.

Knows of Gradio the folder of uploads only. All refusals are `DualParalError`s of one sentence.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.engine.comparer import why_not_plain
from dualparal.engine.takes import check_one
from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.events import Steered, WrappedUp
from dualparal.files import CLIP, START_CLIP
from dualparal.jobs.bin import Bin
from dualparal.jobs.claim import delete_job
from dualparal.jobs.folder import JobFolder, check_job_id, find_job, list_jobs
from dualparal.jobs.looks import rough_film
from dualparal.jobs.notes import Notes, change_notes, read_notes
from dualparal.jobs.takes import from_record as take_from_record
from dualparal.planning.calibration import cache_folder
from dualparal.planning.learnt import wait_s
from dualparal.presets import PACKAGE, Preset
from dualparal.prompts import shot_from_here
from dualparal.request import GenerationRequest, Settings
from dualparal.ui import owners, snapshot
from dualparal.ui.estimate import Estimate, Estimator
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.uploads import is_uploaded
from dualparal.ui.visitors import MAX_JOBS, Visitors, work_of
from dualparal.ui.words import hide

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine
    from dualparal.jobs.job import Job

SHORT_SEEDS = 10**6  # a seed that is easy to remember
TAKES_WITHIN_MS = 60_000  # takes are made one after another
STEER_S = 600.0  # a block step of the largest models takes minutes
MAX_OWNERS = 10_000  # of jobs on disk, remembered


@dataclass
class Studio:
    """An engine as its visitors meet it."""

    engine: Engine
    presets: dict[str, Preset] = field(default_factory=dict)
    device: str = "cpu"
    max_per_address: int | None = MAX_JOBS
    operator_key: str = ""
    estimator: Estimator = field(init=False)
    bin: Bin = field(default_factory=Bin, init=False)
    _known: dict[str, tuple[str, str]] = field(default_factory=dict, init=False)  # job → its owner, its group of takes
    visitors: Visitors = field(init=False)

    def __post_init__(self) -> None:
        self.presets = {**self.presets, self.engine.preset.name: self.engine.preset}
        checkpoint = getattr(self.engine, "checkpoint", None)
        hide(self.outputs, cache_folder(), PACKAGE.parent, Path.cwd(), *([checkpoint.folder] if checkpoint else []))
        self.estimator = Estimator(self.engine)
        self.visitors = Visitors(lambda: [job.id for job in self.engine.jobs()], max_jobs=self.max_per_address)

    @property
    def outputs(self) -> Path:
        return self.engine.outputs

    @property
    def num_ended(self) -> int:
        """Jobs that have ended in this run of the engine."""
        return sum(self.engine.dispatcher.tally.ends.values())

    def usable_presets(self) -> list[Preset]:
        """The engine's own preset first, then the others for the same model (other resolutions, other LoRAs that are here)."""
        own = self.engine.preset
        others = [p for p in self.presets.values() if p.model == own.model and p.name != own.name]
        return [own, *(p for p in others if not p.loras or self.engine.shelf.is_at_hand(p.loras))]

    def preset(self, name: object) -> Preset:
        """The usable preset called `name`; None or '' is the engine's own. Raises `RequestError`."""
        if name is None or name == "":
            return self.engine.preset
        usable = {preset.name: preset for preset in self.usable_presets()}
        if isinstance(name, str) and name in usable:
            return usable[name]
        shown = repr(name if len(repr(name)) < 60 else "…")
        if isinstance(name, str) and name in self.presets:
            if self.presets[name].model == self.engine.preset.model:
                raise RequestError(
                    f"preset={shown} wants LoRAs that are not on this server; use {' or '.join(usable)}", "preset"
                )
            raise RequestError(
                f"preset={shown} is of another model than the one loaded here; use {' or '.join(usable)}", "preset"
            )
        near = difflib.get_close_matches(str(name)[:60], list(usable), n=1, cutoff=0.0)
        raise RequestError(f"preset={shown} is unknown; did you mean '{near[0]}'?", "preset")

    def resolve(self, request: GenerationRequest | Settings, preset_name: object = None) -> Settings:
        """The request completed from the chosen preset and checked against its limits; settings are complete as they are."""
        return self.engine.resolve(request, self.preset(preset_name))

    def estimate(self, request: GenerationRequest | Settings, preset_name: object = None) -> Estimate:
        """What the request will cost, before it is submitted."""
        settings = self.resolve(request, preset_name)
        self.check_loras(settings)
        return self.estimator.estimate(settings, wait_s=self.starts_in_s())

    def submit(
        self, request: GenerationRequest | Settings, preset_name: object = None, *, owner: str = "", address: str = ""
    ) -> Snapshot:
        """Queue a job; the engine refuses with the number what cannot fit, and what is too much for the visitor's `address`
        is refused here."""
        self._check_continued(request, owner)
        check_one(request)
        settings = self.resolve(request, preset_name)
        self.check_loras(settings)
        return self._queued(settings, address, lambda: self.engine.submit(settings, owner=owner))

    def _check_continued(self, request: GenerationRequest | Settings, owner: str) -> None:
        """Raise `RequestError` for a film that is not the owner's own, or a file that was not uploaded."""
        if (film := request.continue_from) is None:
            return
        if not is_uploaded(film):
            self.find(film, owner)

    def check_loras(self, settings: Settings) -> None:
        """Raise `RequestError` for LoRAs that visitors may not ask for: nobody names files of this machine."""
        if settings.loras:
            self.engine.shelf.check_offered(settings.loras, self._loras_of_presets())

    def loras(self) -> list[str]:
        """The LoRAs that visitors may ask for."""
        return self.engine.shelf.offered(self._loras_of_presets())

    def _loras_of_presets(self) -> list[str]:
        return [spec for preset in self.usable_presets() for spec in preset.loras]

    def submit_takes(
        self,
        request: GenerationRequest | Settings,
        takes: int,
        preset_name: object = None,
        *,
        owner: str = "",
        address: str = "",
    ) -> list[Snapshot]:
        """Queue the request with so many seeds, each to its first look; all or none."""
        self._check_continued(request, owner)
        settings = self.resolve(request, preset_name)
        self.check_loras(settings)
        jobs: list[Job] = []

        def submit() -> Job:
            jobs.extend(self.engine.submit_takes(settings, takes, owner=owner))
            return jobs[0]

        self._queued(settings, address, submit)
        return [snapshot.of_job(job) for job in jobs]

    def takes(self, job_id: object, owner: str = "") -> list[Snapshot]:
        """The takes that a job belongs with, itself among them, in their order, as far as they are still there; itself alone
        where it is no take."""
        found = self.find(job_id, owner)
        if found.take is None:
            return [found]
        group, whose = found.take.group, found.owner  # the operator may ask for anybody's
        # First those under way, then the past ones: one that ends in between is in both, and not in neither.
        mine = [snapshot.of_job(job) for job in self.engine.jobs() if job.owner == whose and job.id != found.job_id]
        for folder in self.past(whose):
            is_near = abs(_made_at(folder.job_id) - _made_at(group)) < TAKES_WITHIN_MS and folder.job_id != found.job_id
            if is_near and (one := self.readable(folder)) is not None:
                mine.append(one)
        same = {one.job_id: one for one in (found, *mine) if one.take and one.take.group == group}
        return sorted(same.values(), key=lambda one: one.take.number if one.take else 0)

    def stop(self, job_id: object, owner: str = "") -> None:
        """`cancel` a job, and the takes that it belongs with."""
        for take in self.takes(job_id, owner):
            self.cancel(take.job_id, owner)

    def _queued(self, request: Settings, address: str, submit: Callable[[], Job]) -> Snapshot:
        with self.visitors.submitting(address, work_of(request, self.engine.preset)) as remember:
            job = submit()
            remember(job.id)
        return snapshot.of_job(job)

    def find(self, job_id: object, owner: str = "") -> Snapshot:
        """The job, running or on disk. A job of somebody else is as unknown as one that never was, and so is one that nobody
        can be found to own. Raises `OutputError` when its record is damaged."""
        name = check_job_id(job_id)
        job = self.engine.job(name)
        folder = find_job(self.outputs, name) if job is None else job.folder
        whose = self._owner_of(folder) if job is None else job.owner
        if owner != owners.OPERATOR and (whose is None or not owners.may_touch(owner, whose)):
            raise RequestError(f"there is no job {name} here", "job_id")
        return snapshot.of_folder(folder) if job is None else snapshot.of_job(job)

    def live(self, job_id: object, owner: str = "") -> Snapshot | None:
        """`find` for a job that this engine holds and that has not ended, from memory alone; None for any other."""
        job = self.engine.job(check_job_id(job_id))
        if job is None or not owners.may_touch(owner, job.owner):
            return None
        found = snapshot.of_job(job)
        return None if found.is_ended else found

    def cancel(self, job_id: object, owner: str = "") -> Snapshot:
        """Stop a queued or running job; a job that has ended is left as it is."""
        found = self.find(job_id, owner)
        job = self.engine.job(found.job_id)
        if job is not None and not found.is_ended:
            job.cancel()
        return found

    def steer(self, job_id: object, prompt: object, transition: object = None, owner: str = "") -> Steered:
        """Show another prompt from here on; waits until it is known from which second."""
        found = self.find(job_id, owner)
        shot = shot_from_here(prompt, transition)
        job = self.engine.job(found.job_id)
        if job is None or found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; only a running job can be steered", "job_id")
        try:
            return job.steer(shot.prompt, shot.transition, timeout=STEER_S)
        except TimeoutError as error:
            raise RequestError(str(error), "prompt") from None

    def finish(self, job_id: object, owner: str = "") -> WrappedUp:
        """Let an endless film end with the blocks that have entered; waits until it is known how long it will be."""
        found = self.find(job_id, owner)
        job = self.engine.job(found.job_id)
        if job is None or found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; only a running film is wrapped up", "job_id")
        try:
            return job.finish(timeout=STEER_S)
        except TimeoutError as error:
            raise RequestError(str(error), "job_id") from None

    def note_played(self, job_id: object, played_s: float, owner: str = "") -> None:
        """Somebody watches a job's film and has seen so much: an endless one is not made far ahead of that."""
        job = self.engine.job(check_job_id(job_id))
        if job is not None and owners.may_touch(owner, job.owner):
            job.tell_played(played_s)

    def try_another(self, job_id: object, owner: str = "", address: str = "") -> Snapshot:
        """Stop a job and queue the same with a newly drawn seed."""
        return self._asked_again(self.cancel(job_id, owner), owner, address, seed=secrets.randbelow(SHORT_SEEDS))

    def look(self, found: Snapshot) -> Path | None:
        """The rough film of a job so far, an animated WebP; None before its first look. Raises `OutputError`."""
        try:
            return rough_film(found.folder, found.request.fps)
        except OSError as error:
            raise OutputError(f"the look of job {found.job_id} cannot be written: {error.strerror}; free space") from None

    def can_resume(self, found: Snapshot) -> bool:
        """Whether the job ended before its last block was made, so that it can go on from its last saved sweep."""
        return found.state in ("failed", "cancelled", "interrupted") and found.started is not None and not found.is_baseline

    def resume(self, job_id: object, owner: str = "", address: str = "") -> Snapshot:
        """Queue again a job that was stopped, failed or was cut off; it gives the bits it would have given."""
        found = self.find(job_id, owner)
        return self._queued(found.request, address, lambda: self.engine.resume(found.job_id))

    def can_compare(self, found: Snapshot) -> bool:
        """Whether plain Wan can be asked for the same video."""
        is_plain = why_not_plain(found.request) is None
        return found.state == "finished" and self.engine.can_compare and not found.is_baseline and is_plain

    def compare(self, job_id: object, owner: str = "", address: str = "") -> Snapshot:
        """Queue the request of a finished job for plain Wan, in one pass over the whole video."""
        found = self.find(job_id, owner)
        if not self.can_compare(found):
            raise RequestError(
                f"job {found.job_id} cannot be compared: only finished videos of the model as it is can", "job_id"
            )
        return self._queued(found.request, address, lambda: self.engine.compare(found.request, owner=owner))

    def delete(self, job_id: object, owner: str = "") -> Snapshot | None:
        """Remove an ended job and its files; what it was, None where it cannot be read."""
        try:
            found = self.find(job_id, owner)
        except OutputError:  # its record is damaged, and it is the caller's
            delete_job(find_job(self.outputs, job_id))
            return None
        if not found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; stop it before deleting it", "job_id")
        if (job := self.engine.job(found.job_id)) is not None:
            job.release()  # a full disk has not taken its end: deleting it may be what makes room
        delete_job(found.folder)
        self.engine.forget(found.job_id)  # else it would be found, and compared, for a while
        return found

    def put_away(self, job_id: object, owner: str = "", batch: str = "") -> None:
        """`delete` that can be undone for a while (`bin`), together with others of one `batch`; what cannot be read goes at
        once."""
        try:
            found = self.find(job_id, owner)
        except OutputError:
            self.delete(job_id, owner)
            return
        if not found.is_ended:
            raise RequestError(f"job {found.job_id} is {found.state}; stop it before deleting it", "job_id")
        if (job := self.engine.job(found.job_id)) is not None:
            job.release()
        self.bin.put(found.folder, owner, read_notes(found.folder).name or found.request.all_text or found.job_id, batch)
        self.engine.forget(found.job_id)

    def note(self, job_id: object, owner: str = "", *, name: str | None = None, is_starred: bool | None = None) -> Notes:
        """Give a job a name, or a star; a star that is neither given nor taken changes."""
        folder = self.find(job_id, owner).folder
        if name is None and is_starred is None:
            is_starred = not read_notes(folder).is_starred
        return change_notes(folder, name=name, is_starred=is_starred)

    def again(self, job_id: object, owner: str = "", address: str = "") -> Snapshot:
        """Queue the request of a job anew, with its seed."""
        return self._asked_again(self.find(job_id, owner), owner, address)

    def _asked_again(self, found: Snapshot, owner: str, address: str, **changes: Any) -> Snapshot:
        changes["start_image"] = found.request.start_image and str(found.folder.start_image)
        if (found.request.continue_from or "").startswith(CLIP):
            changes["continue_from"] = str(found.folder.path / START_CLIP)
        settings = found.request.model_copy(update=changes)
        self.check_loras(settings)
        make = self.engine.compare if found.is_baseline else self.engine.submit
        return self._queued(settings, address, lambda: make(settings, owner=owner))

    def owner_of(self, token: object, username: str | None = None) -> str:
        """Whose jobs a caller may touch: `owners.owner_of`, or everybody's with the operator's key."""
        if self.operator_key and isinstance(token, str) and owners.is_same(token, self.operator_key):
            return owners.OPERATOR
        return owners.owner_of(token, username)

    def active(self, owner: str) -> list[Snapshot]:
        """The owner's queued and running jobs, in the order they will run."""
        return [snapshot.of_job(job) for job in self.engine.jobs() if owner and job.owner == owner]

    def past(self, owner: str) -> list[JobFolder]:
        """The folders of the owner's jobs that this engine does not hold, newest first."""
        running = {job.id for job in self.engine.jobs()}
        folders = list_jobs(self.outputs) if owner else ()
        return [folder for folder in folders if folder.job_id not in running and self._owner_of(folder) == owner]

    def grouped(self, folders: Sequence[JobFolder]) -> list[list[JobFolder]]:
        """`folders` with takes of one request together, where the newest of them is."""
        groups: dict[str, list[JobFolder]] = {}
        for folder in folders:
            self._owner_of(folder)
            group = self._known.get(folder.job_id, ("", ""))[1] or folder.job_id
            groups.setdefault(group, []).append(folder)
        return list(groups.values())

    def readable(self, folder: JobFolder) -> Snapshot | None:
        """The job; None for a folder cut off while it was made or being deleted, or damaged."""
        try:
            return snapshot.of_folder(folder)
        except (DualParalError, OSError):
            return None

    def _owner_of(self, folder: JobFolder) -> str | None:
        """Whose job it is; it and the takes that it belongs with are read once: records are written once."""
        if (known := self._known.get(folder.job_id)) is None:
            take = None
            try:
                record = folder.record()
                owner, take = str(record.get("owner") or ""), take_from_record(record)
            except OutputError:
                if (by_journal := folder.owner()) is None:
                    return None
                owner = by_journal
            while len(self._known) >= MAX_OWNERS:
                self._known.pop(next(iter(self._known)), None)
            known = self._known[folder.job_id] = (owner, take.group if take else "")
        return known[0]

    def starts_in_s(self, job_id: str = "") -> float | None:
        """Seconds until the queued job `job_id`, or one that would be queued now, is expected to start; None while nothing is
        known."""
        ahead_s: list[float] = []
        for job in self.engine.jobs():
            if job.id == job_id:
                break
            progress = job.view().progress
            left_s = progress.eta_s if progress else self.estimator.time_s(job.request)
            if left_s is None:
                return None
            ahead_s.append(left_s)
        return wait_s(ahead_s, self.engine.num_replicas)

    def settings(self, found: Snapshot) -> dict[str, Any]:
        """The settings as a plain dictionary."""
        return found.request.model_dump(exclude_none=True)


def _made_at(job_id: str) -> int:
    """When a job was made, in milliseconds, as its id tells; 0 where somebody has named it."""
    first = job_id.partition("-")[0]
    return int(first, 16) if len(first) == 11 else 0
