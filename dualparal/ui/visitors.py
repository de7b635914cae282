"""How much of the queue one address may fill. Owners are only names that anybody can invent; addresses are not.

Behind a proxy the address is the one that the proxy names, if it runs on this machine or is listed in uvicorn's
FORWARDED_ALLOW_IPS. Counts what waits and runs now; nothing is kept of who has been here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator

from dualparal.errors import QueueFull
from dualparal.presets import Preset
from dualparal.request import Settings

MAX_JOBS = 16  # of one address, which may be a whole office's
LONGEST_VIDEOS = 8  # an address's open jobs are at most the work of so many of the preset's longest videos


def work_of(request: Settings, preset: Preset) -> float:
    """Work of settings in the preset's longest videos: seconds x pixels x steps over theirs."""
    longest = preset.limits.seconds * preset.height * preset.width * preset.num_inference_steps
    seconds = 4 * request.latents_num / request.fps
    return seconds * request.height * request.width * request.num_inference_steps / longest


class Visitors:
    """Open jobs by address. Thread-safe."""

    def __init__(self, open_ids: Callable[[], Collection[str]], *, max_jobs: int | None = MAX_JOBS) -> None:
        """`open_ids` gives the jobs that wait or run; at most `max_jobs` of one address do (None: no limits at all)."""
        self._open_ids, self._max_jobs = open_ids, max_jobs
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[str, float]] = {}  # id → address, work

    @contextlib.contextmanager
    def submitting(self, address: str, work: float) -> Iterator[Callable[[str], None]]:
        """Make sure that `address` may add so much work; inside, tell what is given of the new job's id. Raises `QueueFull`."""
        with self._lock:
            if self._max_jobs is not None and address:
                self._check(address, work, self._max_jobs)
            yield lambda job_id: self._jobs.update({job_id: (address, work)})

    def _check(self, address: str, work: float, max_jobs: int) -> None:
        known = set(self._open_ids())
        self._jobs = {job_id: entry for job_id, entry in self._jobs.items() if job_id in known}
        mine = [entry[1] for entry in self._jobs.values() if entry[0] == address]
        if len(mine) >= max_jobs:
            raise QueueFull(f"{len(mine)} jobs from your address wait or run, the most there may be; wait for one to end")
        if mine and sum(mine) + work > LONGEST_VIDEOS:
            raise QueueFull(
                f"the jobs from your address are the work of {sum(mine):.1f} of the longest videos that may be made here, and "
                f"may be that of {LONGEST_VIDEOS}; wait for one to end or ask for a shorter video"
            )
