"""Early looks: small pictures of what each block is becoming, made on rank 0 while it is denoised.

A block's prediction says what its clean latents will be (METHOD.md, "The early look"); a linear map makes pictures of them. A
thread of its own does that from references, since nothing of a job is ever written in place: rank 0 waits for nothing, and no
bit of the video depends on it. Only the newest state of a block is kept for it, a few of its steps are looked at, and the
thread takes no more than its share of the run's time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dualparal.events import Look
from dualparal.media.rough import pack
from dualparal.method.sampler import BlockSampler
from dualparal.model.latent_rgb import LatentRgb, find_map
from dualparal.model.layout import Checkpoint

log = logging.getLogger(__name__)
EACH_OF_FIRST = 3  # steps; most changes there
NUM_LATER = 5
MAX_SHARE = 0.005  # of the run's time, in this thread
AHEAD_S = 0.02  # may be spent before the run has lasted
CLOSE_S = 1.0  # for the look under way
FIND_AGAIN_S = 2.0  # while no map is known


def looked_at(num_steps: int) -> frozenset[int]:
    """The steps after which a block is looked at, counted from 1: the first ones, then a few more as far apart as another."""
    rest = max(0, num_steps - EACH_OF_FIRST)
    later = (EACH_OF_FIRST + -(-rest * k // (NUM_LATER + 1)) for k in range(1, NUM_LATER + 1))
    return frozenset({*range(1, EACH_OF_FIRST + 1), *later} & {*range(1, num_steps)})


class MapFinder:
    """The map of a checkpoint, once it is known: the codec may still be fitting it."""

    def __init__(self, checkpoint: Checkpoint, cache: Path) -> None:
        self._checkpoint, self._cache = checkpoint, cache
        self._found: LatentRgb | None = None
        self._next_s = 0.0

    def __call__(self) -> LatentRgb | None:
        if self._found is None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + FIND_AGAIN_S
            try:
                self._found = find_map(self._checkpoint, self._cache)
            except OSError as error:
                log.info("the map of the early look cannot be read: %s", error)
        return self._found


class Looks:
    """The looks of one job: `see` is told of every step, `send` gets each look."""

    def __init__(
        self, job_id: str, num_steps: int, find: Callable[[], LatentRgb | None], send: Callable[[Look], None],
        *, max_share: float = MAX_SHARE,
    ) -> None:  # fmt: skip
        self._job_id, self._num_steps, self._find, self._send = job_id, num_steps, find, send
        self._steps, self._max_share = looked_at(num_steps), max_share
        self._changed = threading.Condition()
        self._newest: dict[int, tuple[int, torch.Tensor]] = {}  # by block: steps done, clean latents as they seem now
        self._is_closed = False
        self._started_s = time.monotonic()
        self.seconds = 0.0  # of processor time, spent on looks
        self._thread = threading.Thread(target=self._run, name="looks", daemon=True)
        self._thread.start()

    def see(self, block: int, steps_done: int, sampler: BlockSampler) -> None:
        """Take note of a step that has just been made. Never waits for a look."""
        if steps_done in self._steps:
            with self._changed:
                if not self._is_closed:
                    self._newest[block] = steps_done, sampler.clean
                    self._changed.notify()

    def close(self) -> None:
        """No more looks; what has not been made yet is dropped."""
        with self._changed:
            self._is_closed = True
            self._newest.clear()
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (found := self._next()) is not None:
            began_s = time.thread_time()
            try:
                self._show(*found)
            except (RuntimeError, OSError, ValueError) as error:  # a GPU without memory for it, a picture of no size
                log.warning("no more early looks of this job: %s", error)
                with self._changed:
                    self._is_closed = True
                    self._newest.clear()
                return
            self.seconds += time.thread_time() - began_s

    def _show(self, block: int, steps_done: int, latents: torch.Tensor) -> None:
        if (rgb := self._find()) is None:
            return
        with torch.inference_mode():
            pictures = rgb.paint(latents).cpu().numpy()
        self._send(
            Look(
                job_id=self._job_id, block=block, step=steps_done, num_steps=self._num_steps, num_pictures=len(pictures),
                picture=pack(pictures),
            )
        )  # fmt: skip

    def _next(self) -> tuple[int, int, torch.Tensor] | None:
        """The oldest block that waits, at its newest step, once there is time for it; None at the end."""
        with self._changed:
            while not self._is_closed:
                too_early_s = (self.seconds - AHEAD_S) / self._max_share - (time.monotonic() - self._started_s)
                if self._newest and too_early_s <= 0:
                    block = next(iter(self._newest))
                    return block, *self._newest.pop(block)
                self._changed.wait(too_early_s if self._newest else None)
        return None
