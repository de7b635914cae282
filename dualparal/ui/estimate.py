"""What a request will cost, before it runs: frames, blocks, memory, and time as learnt from the jobs already on disk.

The time of a block step is taken to grow with the tokens a forward pass sees and with the number of guidance halves; the
factor is the median of the last finished jobs of the same model.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualparal.core.plan import BlockPlan
from dualparal.core.rules import step_cache
from dualparal.errors import DualParalError
from dualparal.events import Finished, Started
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.journal import JobFolder, list_jobs

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine

LEARN_FROM_JOBS = 8
LOOK_AT_FOLDERS = 60
RELEARN_AFTER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one resolved request. None means not known. `refusal` is a sentence when it cannot run here."""

    num_frames: int
    seconds: float
    num_blocks: int
    num_items: int
    time_s: float | None = None
    bytes_per_rank: int | None = None
    refusal: str | None = None


def num_blocks_of(request: GenerationRequest) -> int:
    """Blocks the resolved request is cut into."""
    assert request.latents_num and request.num_per_block and request.num_cat is not None
    return BlockPlan.of(request.latents_num, request.num_per_block, request.num_cat).num_blocks


def work_of(request: GenerationRequest) -> float:
    """Token passes of the whole request: computed block steps x tokens a pass sees x guidance halves."""
    assert request.num_inference_steps and request.height and request.width and request.num_per_block and request.latents_num
    window = min(request.latents_num, request.num_per_block + 2 * (request.num_cat or 0))
    tokens = window * (request.height // 16) * (request.width // 16)
    halves = 2 if (request.guidance_scale or 0) > 1 else 1
    cache = step_cache(request)
    steps = cache.mean_computed(request.num_inference_steps) if cache else request.num_inference_steps
    return num_blocks_of(request) * steps * tokens * halves


class Estimator:
    """Learns from the jobs in the engine's output folder; cheap to ask, looks at the disk at most every few seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        checkpoint = getattr(engine, "checkpoint", None)
        self._model = str(checkpoint.folder) if checkpoint else engine.preset.model
        self._seconds_per_work: float | None = None
        self._learnt_at = -RELEARN_AFTER_S

    def estimate(self, request: GenerationRequest) -> Estimate:
        """The costs of a resolved request."""
        assert request.latents_num and request.num_inference_steps and request.fps
        num_blocks = num_blocks_of(request)
        num_frames = frames_of_latents(request.latents_num)
        plan = self._engine.plan(request, is_short=True)
        return Estimate(
            num_frames=num_frames, seconds=num_frames / request.fps, num_blocks=num_blocks,
            num_items=num_blocks * request.num_inference_steps, time_s=self.time_s(request),
            bytes_per_rank=plan.bytes_per_rank, refusal=plan.refusal,
        )  # fmt: skip

    def time_s(self, request: GenerationRequest) -> float | None:
        """Seconds that the resolved request will run; None while nothing has been learnt. Cheap."""
        rate = self.seconds_per_work()
        return None if rate is None else rate * work_of(request)

    def seconds_per_work(self) -> float | None:
        """Seconds per token pass, the median of the last finished jobs of this model; None before the first."""
        if time.monotonic() - self._learnt_at > RELEARN_AFTER_S:
            self._learnt_at = time.monotonic()
            self._seconds_per_work = self._learn()
        return self._seconds_per_work

    def _learn(self) -> float | None:
        rates: list[float] = []
        for number, folder in enumerate(list_jobs(self._engine.outputs)):
            if number >= LOOK_AT_FOLDERS or len(rates) >= LEARN_FROM_JOBS:
                break
            rate = self._rate_of(folder)
            if rate:
                rates.append(rate)
        return statistics.median(rates) if rates else None

    def _rate_of(self, folder: JobFolder) -> float | None:
        events = folder.events()
        started = next((event for event in events if isinstance(event, Started)), None)
        final = events[-1] if events else None
        if started is None or not isinstance(final, Finished):
            return None
        try:
            record = folder.record()
            if (
                record.get("baseline")
                or record.get("model") != self._model
                or record.get("ranks", self._engine.ranks) != self._engine.ranks
            ):
                return None
            return (final.time_s - started.time_s) / work_of(GenerationRequest(**record["request"]))
        except (DualParalError, KeyError, TypeError, AssertionError):
            return None
