"""Times learnt from videos that were made, and from that when a queue gets to a job. Pure arithmetic on `job_plan`'s work.

What a job spends outside denoising (its text, the last block's decoding, joining) hardly depends on its work and is learnt by
itself, so that short jobs say nothing absurd of long ones.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class MadeJob:
    """A job that ran without a break: its `work` (`JobPlan.work`), seconds of denoising, and of all besides."""

    work: float
    denoise_s: float
    besides_s: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds per unit of work, and of what every job spends besides."""

    s_per_work: float
    besides_s: float = 0.0

    def time_s(self, work: float) -> float:
        """Seconds that a job of so much work runs."""
        return self.besides_s + work * self.s_per_work


def learn_pace(jobs: Sequence[MadeJob]) -> Pace | None:
    """The pace of `jobs`; None without any.

    The rate is their median weighted by work: many small jobs, which are mostly overhead, do not outweigh a large one, and one
    that was slowed down by something else does not count alone.
    """
    by_rate = sorted((job.denoise_s / job.work, job.work) for job in jobs if job.work > 0)
    if not by_rate:
        return None
    reached = list(accumulate(work for _, work in by_rate))
    rate = next(rate for (rate, _), seen in zip(by_rate, reached, strict=True) if seen >= reached[-1] / 2)
    return Pace(s_per_work=rate, besides_s=statistics.median(max(0.0, job.besides_s) for job in jobs))


def wait_s(ahead_s: Iterable[float], replicas: int) -> float:
    """Seconds until a replica is free for one more job; `ahead_s`: what each job before it still takes, those at work first,
    then the queue in its order."""
    free_s = [0.0] * replicas
    for left_s in ahead_s:
        heapq.heapreplace(free_s, free_s[0] + left_s)
    return free_s[0]
