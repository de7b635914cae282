"""Deleted jobs that can be had back for a while: out of everybody's sight at once, gone from the disk some time later.

What is in the bin when the program ends is deleted when the next one starts, as what was cut off while it was deleted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dualparal.errors import OutputError, RequestError
from dualparal.jobs.claim import claim
from dualparal.jobs.folder import JobFolder

KEEP_S = 60.0


@dataclass(frozen=True)
class Binned:
    """A job in the bin: whose it is, what it is called there, and what was deleted with it (`batch`: the first of them)."""

    folder: JobFolder
    owner: str
    title: str
    batch: str
    timer: threading.Timer


class Bin:
    """Thread-safe."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._jobs: dict[str, Binned] = {}

    def put(self, folder: JobFolder, owner: str, title: str, batch: str = "") -> None:
        """Take an ended job out of sight. Raises `RequestError` when somebody works on it, `OutputError`."""
        held = claim(folder)
        try:
            folder.put_away()
        finally:
            held.release()
        timer = threading.Timer(self._keep_s, self._empty, [folder.job_id])
        timer.daemon = True
        with self._lock:
            self._jobs[folder.job_id] = Binned(folder, owner, title, batch or folder.job_id, timer)
        timer.start()

    def take_back(self, job_id: object, owner: str) -> JobFolder:
        """Put a job back where it was. Raises `RequestError` where it is not there, or not there any more."""
        with self._lock:
            found = self._jobs.get(job_id) if isinstance(job_id, str) else None
            if found is None or found.owner != owner:
                raise RequestError("it is deleted for good", "job_id")
            del self._jobs[found.folder.job_id]
        found.timer.cancel()
        found.folder.take_back()
        return found.folder

    def last(self, owner: str) -> list[Binned]:
        """What `owner` deleted last, together, while it can be had back."""
        with self._lock:
            mine = [found for found in self._jobs.values() if found.owner == owner]
        return [found for found in mine if found.batch == mine[-1].batch]

    def _empty(self, job_id: str) -> None:
        with self._lock:
            found = self._jobs.pop(job_id, None)
        if found is not None:
            try:
                found.folder.drop_put_away()
            except OutputError:  # the next start tries again
                return
