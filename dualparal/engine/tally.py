"""What has happened to jobs since the program began: what the counters of `metrics` tell. Knows no engine."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from dualparal.events import Finished

if TYPE_CHECKING:
    from dualparal.jobs.job import Job

FIRST_FRAMES_BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Tally:
    """Counts of jobs and frames. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_submitted = self.num_interrupted = self.num_frames = 0
        self.ends: Counter[str] = Counter()
        self.first_frames = [0] * (len(FIRST_FRAMES_BUCKETS_S) + 1)  # the last: later than every bucket
        self.first_frames_sum_s = 0.0
        self.denoise_s = 0.0

    def submitted(self) -> None:
        """A job was queued (or queued again)."""
        with self._lock:
            self.num_submitted += 1

    def interrupted(self) -> None:
        """A job was cut off and goes on by itself."""
        with self._lock:
            self.num_interrupted += 1

    def ended(self, job: Job) -> None:
        """A job has ended."""
        final, first_s = job.view().final, job.first_frames_s
        with self._lock:
            self.ends[type(final).__name__.lower()] += 1
            self.num_frames += max(0, getattr(final, "num_frames", 0) - job.num_frames_before)
            if isinstance(final, Finished):
                self.denoise_s += final.timings.get("denoise_s", 0.0)
            if first_s is not None:
                self.first_frames[sum(first_s > limit for limit in FIRST_FRAMES_BUCKETS_S)] += 1
                self.first_frames_sum_s += first_s
