"""A job's early looks in the front end: the newest of each block, in memory for whoever follows it and in the job's folder.

outputs/<job id>/look/0003.jpg   block 3 as it was last seen (`media.rough`)
                 look.webp       the film of them, made when somebody asks
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dualparal.events import Look
from dualparal.files import private, written_atomically
from dualparal.jobs.folder import JobFolder
from dualparal.media.rough import film, unpack

log = logging.getLogger(__name__)


class Looks:
    """Not thread-safe: the job's lock guards it."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._newest: dict[int, tuple[int, Look]] = {}  # by block, the oldest first; with the number it came as
        self.num_taken = 0

    def take(self, look: Look) -> None:
        """Keep a look in place of the block's last one. A full disk costs the file, not the look."""
        self._newest.pop(look.block, None)
        self.num_taken += 1
        self._newest[look.block] = self.num_taken, look
        try:
            self._folder.look.mkdir(mode=0o700, exist_ok=True)
            _write(self._folder.look / f"{look.block:04d}.jpg", look.picture)
        except OSError as error:
            log.info("job %s: a look could not be stored: %s", self._folder.job_id, error)

    def since(self, num_seen: int) -> list[Look]:
        """The looks taken after the first `num_seen`, each block's newest only."""
        return [look for number, look in self._newest.values() if number > num_seen]

    def seen(self) -> Mapping[int, Look]:
        """The newest by block."""
        return {block: look for block, (_, look) in self._newest.items()}


def rough_film(folder: JobFolder, fps: int) -> Path | None:
    """The film so far as a small animated WebP in the job's folder: each block as it was last seen, from the first on; None
    before the first look. Raises OSError."""
    path = folder.path / "look.webp"
    looked = sorted(folder.look.glob("[0-9]*.jpg"))
    with contextlib.suppress(OSError):
        if looked and max(file.stat().st_mtime_ns for file in looked) < path.stat().st_mtime_ns:
            return path
    data = film(read_looks(folder), fps)
    if data is None:
        return None
    _write(path, data)
    return path


def read_looks(folder: JobFolder) -> Iterator[np.ndarray]:
    """The pictures [F, h, w, 3] of each block on disk, up to the first that has none. Raises OSError."""
    block = 0
    while (path := folder.look / f"{block:04d}.jpg").is_file():
        try:
            pictures = unpack(path.read_bytes())
        except ValueError:  # damaged
            return
        yield pictures
        block += 1


def _write(path: Path, data: bytes) -> None:
    with written_atomically(path, is_durable=False, is_shared=True) as partial, open(partial, "wb", opener=private) as opened:
        opened.write(data)
