"""What a request will cost, before it runs: frames, blocks, memory, and time as learnt from the jobs already on disk.

Its work is the plan's (`JobPlan.work`); how long a unit of it takes is learnt from the last finished jobs of an engine like
this one (`planning.learnt`), and before the first of them taken from `plan --calibrate`, where that has been run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from dualparal.errors import DualParalError
from dualparal.events import Finished, Progress
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.jobs.history import fold
from dualparal.method.rules import plan_of
from dualparal.planning.idle import idle_ranks
from dualparal.planning.learnt import MadeJob, Pace, learn_pace
from dualparal.presets import restore
from dualparal.request import Settings

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

LEARN_FROM_JOBS = 8
LOOK_AT_FOLDERS = 60
RELEARN_AFTER_S = 10.0
KNOWN_REQUESTS = 256


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one completed request: it begins in `wait_s` and then takes `time_s`. None means not known. `refusal` is
    a sentence when it cannot run here; `chosen` says why auto chose schedule and context, `idle` that ranks will wait, or
    nothing."""

    num_frames: int
    seconds: float
    num_blocks: int
    num_items: int
    time_s: float | None = None
    wait_s: float | None = None
    bytes_per_rank: int | None = None
    refusal: str | None = None
    chosen: str = ""
    idle: str = ""
    is_endless: bool = False


class _Costs(NamedTuple):
    """Of the plan of a request, which takes long to make for a long film."""

    work: float
    first_share: float  # of the work, done when the first block is denoised
    calibrated_s: float | None


def num_blocks_of(request: Settings) -> int:
    """Blocks the completed request is cut into."""
    return plan_of(request).num_blocks


class Estimator:
    """Learns from the jobs in the engine's output folder; cheap to ask, looks at the disk at most every few seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        checkpoint = getattr(engine, "checkpoint", None)
        self._model = str(checkpoint.folder) if checkpoint else engine.preset.model
        self._pace: Pace | None = None
        self._costs: dict[str, _Costs] = {}  # of requests as JSON
        self._learnt_at = -RELEARN_AFTER_S

    def estimate(self, request: Settings, *, wait_s: float | None = None) -> Estimate:
        """The costs of a completed request that would begin in `wait_s`."""
        num_blocks = num_blocks_of(request)
        num_frames = request.num_frames
        plan = self._engine.plan(request, is_short=True)
        self._costs_of(request)
        return Estimate(
            num_frames=num_frames, seconds=num_frames / request.fps, num_blocks=num_blocks,
            num_items=num_blocks * request.num_inference_steps, time_s=self.time_s(request), wait_s=wait_s,
            bytes_per_rank=plan.bytes_per_rank, refusal=plan.refusal, chosen=request.chosen,
            idle=idle_ranks(request, self._engine.grid),
            is_endless=request.is_endless,
        )  # fmt: skip

    def time_s(self, request: Settings) -> float | None:
        """Seconds that the request will run; None while nothing has been learnt or measured. Cheap the second time."""
        pace = self.pace()
        if pace is not None:
            return pace.time_s(self._costs_of(request).work)
        return self._costs_of(request).calibrated_s

    def first_frames_in_s(self, request: Settings, progress: Progress) -> float | None:
        """Seconds until the first block of a job under way is denoised; None when it is, or nothing is known of the time."""
        known = self._costs.get(_key(request))  # planned when it was submitted; here the page's loop waits
        done = progress.items_done / max(1, progress.num_items)
        if known is None or progress.eta_s is None or done >= known.first_share:
            return None
        return progress.eta_s * (known.first_share - done) / (1 - done)

    def pace(self) -> Pace | None:
        """What the last finished jobs of an engine like this one have taken; None before the first."""
        if time.monotonic() - self._learnt_at > RELEARN_AFTER_S:
            self._learnt_at = time.monotonic()
            self._pace = learn_pace(list(islice(self._made_jobs(), LEARN_FROM_JOBS)))
        return self._pace

    def _costs_of(self, request: Settings) -> _Costs:
        key = _key(request)
        if (known := self._costs.get(key)) is None:
            if len(self._costs) >= KNOWN_REQUESTS:
                self._costs.clear()
            plan = self._engine.plan(request)
            known = self._costs[key] = _Costs(plan.work, plan.first_share, plan.total_s)
        return known

    def _made_jobs(self) -> Iterator[MadeJob]:
        for folder in islice(list_jobs(self._engine.outputs), LOOK_AT_FOLDERS):
            try:
                if (job := self._made_job(folder)) is not None:
                    yield job
            except (DualParalError, KeyError, TypeError, ValueError):  # a record of another version
                continue

    def _made_job(self, folder: JobFolder) -> MadeJob | None:
        """A finished job of an engine like this one that was never cut off, and whose times were measured."""
        history = fold(folder.events())
        final = history.final
        if history.num_runs != 1 or not history.is_timed or not isinstance(final, Finished) or "denoise_s" not in final.timings:
            return None
        record = folder.record()
        alike = {"model": self._model, "ranks": self._engine.ranks, "guidance_parallel": self._engine.grid.guidance}
        alike |= {name: getattr(self._engine, name, None) for name in ("dtype", "threads")}
        if record.get("baseline") or any(record.get(name, here) != here for name, here in alike.items()):
            return None
        denoise_s = final.timings["denoise_s"]
        work = self._costs_of(restore(record["request"])).work
        return MadeJob(work=work, denoise_s=denoise_s, besides_s=history.worked_s - denoise_s)


def _key(request: Settings) -> str:
    return request.model_dump_json(
        exclude={"prompt": True, "negative_prompt": True, "seed": True, "chosen": True, "shots": {"__all__": {"prompt"}}}
    )
