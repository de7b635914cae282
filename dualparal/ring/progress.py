"""Counts a job's block steps on rank 0 and tells the front end where it stands."""

from __future__ import annotations

import time

from dualparal.events import Progress
from dualparal.method.schedule import Item, Schedule
from dualparal.ring.worker import Uplink

PROGRESS_INTERVAL_S = 0.2


class ProgressReport:
    """Counts block steps and tells the front end a few times a second."""

    def __init__(self, job_id: str, schedule: Schedule, uplink: Uplink, start: int = 0) -> None:
        self._job_id, self._num_steps, self._uplink = job_id, schedule.num_steps, uplink
        self.follow(schedule, start)

    def follow(self, schedule: Schedule, start: int) -> None:
        """Count by `schedule`, of which the items before `start` are done."""
        self._steps = [0] * schedule.plan.num_blocks
        # Window frames are a fair measure of an item's work.
        self._frames = {(item.block, item.step): sum(schedule.window_frames(item)) for item in schedule.items if item.is_whole}
        self._total = sum(self._frames.values())
        self._done = 0
        for item in schedule.items[:start]:
            if item.is_whole:
                self._steps[item.block] = item.step + 1
                self._done += self._frames[item.block, item.step]
        self._resumed_at = self._done
        self._started_s = time.monotonic()
        self._sent_s = 0.0

    def step(self, item: Item) -> None:
        self._steps[item.block] = item.step + 1
        self._done += self._frames[item.block, item.step]
        if self._done == self._resumed_at:  # skipped steps only: no work yet to tell the time by
            return
        now_s = time.monotonic()
        is_last = self._done == self._total
        if now_s - self._sent_s < PROGRESS_INTERVAL_S and not is_last and item.step + 1 < self._num_steps:
            return
        self._sent_s = now_s
        rate = (self._done - self._resumed_at) / max(now_s - self._started_s, 1e-6)
        self._send(eta_s=(self._total - self._done) / rate)

    def hold(self) -> None:
        """Tell that the job waits for who watches."""
        self._send(is_held=True)

    def _send(self, *, eta_s: float | None = None, is_held: bool = False) -> None:
        self._uplink.send(
            Progress(
                job_id=self._job_id,
                items_done=sum(self._steps),
                num_items=len(self._steps) * self._num_steps,
                num_steps=self._num_steps,
                block_steps=tuple(self._steps),
                eta_s=eta_s,
                is_held=is_held,
            )
        )
