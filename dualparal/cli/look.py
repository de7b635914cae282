"""`--look FILE`: the rough film of a job as an animated WebP on disk, written anew as it grows."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.events import FINAL, Event, Look
from dualparal.files import written_atomically
from dualparal.jobs.looks import rough_film

if TYPE_CHECKING:
    from dualparal.jobs.job import Job

EVERY_S = 1.0
MAX_SHARE = 0.02  # of the time goes into writing it


class LookFile:
    """Is told of every event of `job`, and keeps `path` as it is now: at most once a second, and at the end."""

    def __init__(self, path: Path, job: Job) -> None:
        self._path, self._job = path, job
        self._next_s = 0.0
        self._is_old = self._has_failed = False

    def take(self, event: Event) -> None:
        self._is_old = self._is_old or isinstance(event, Look)
        if self._is_old and not self._has_failed and (isinstance(event, FINAL) or time.monotonic() >= self._next_s):
            self._write()

    def _write(self) -> None:
        began_s = time.monotonic()
        try:
            made = rough_film(self._job.folder, self._job.request.fps)
            if made is not None:
                with written_atomically(self._path, is_durable=False) as partial:
                    shutil.copyfile(made, partial)
        except OSError as error:  # costs the look, not the video
            self._has_failed = True
            print(f"{self._path} could not be written: {error.strerror}", file=sys.stderr, flush=True)
        self._is_old = False
        self._next_s = time.monotonic() + max(EVERY_S, (time.monotonic() - began_s) / MAX_SHARE)
