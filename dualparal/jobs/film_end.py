"""The film that another job is to continue: whether it can be, and what of it the new job takes along.

Reads names, sizes and what a file says of itself; the latents are rank 0's business (`ring.start`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dualparal.errors import OutputError, RequestError
from dualparal.files import BEFORE, START_LATENTS, is_file
from dualparal.jobs.folder import JobFolder, find_job
from dualparal.jobs.history import fold
from dualparal.media.metadata import describe
from dualparal.request import Settings

FIELD = "continue_from"


@dataclass(frozen=True)
class KeptFilm:
    """A film whose end was kept: `shape` of its latents [1, C, F, h, w], `num_frames` of its mp4."""

    folder: JobFolder
    settings: Settings
    shape: tuple[int, ...]
    num_frames: int

    def files(self, *, is_joined: bool) -> Mapping[str, bytes | Path]:
        """What a job that continues it takes into its folder, by name. Raises `RequestError`."""
        try:
            latents = self.folder.end.read_bytes()
        except OSError as error:
            raise _refused(f"the end of job {self.folder.job_id} cannot be read ({error.strerror})") from None
        return {START_LATENTS: latents, **({BEFORE: self.folder.video} if is_joined else {})}


def find_film(outputs: Path, job_id: str) -> KeptFilm:
    """The film of a job that has ended. Raises `RequestError` where there is none, or its end was not kept."""
    folder = find_job(outputs, job_id)
    try:
        history, settings = fold(folder.events()), folder.request()
    except OutputError as error:
        raise _refused(str(error)) from None
    if history.final is None:
        raise _refused(f"job {job_id} has not ended; wait for it or stop it first")
    if not history.num_frames or not is_file(folder.video):
        raise _refused(f"job {job_id} has left no video; continue one that has")
    shape, num_frames = _about(folder)
    if num_frames != history.num_frames:
        raise _refused(
            f"job {job_id} has not kept the end of its video, which only finished and stopped jobs do since this version; "
            "make it again"
        )
    return KeptFilm(folder, settings, shape, int(describe(folder.video)["num_frames"]))


def _about(folder: JobFolder) -> tuple[tuple[int, ...], int]:
    """(shape of the latents, frames that were made); ((), 0) where nothing was kept that can be read."""
    try:
        with safe_open(folder.end, framework="numpy") as opened:
            shape = tuple(opened.get_slice("latents").get_shape())
            return shape, int((opened.metadata() or {}).get("num_frames", 0))
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return (), 0


def _refused(why: str) -> RequestError:
    return RequestError(f"{FIELD}: {why}", FIELD)
