"""Room on the disk: what a video will need, whether it is there, and a limit kept by deleting the oldest ended jobs.

Only whole job folders go, only those of jobs that have ended in the journal; what waits, runs or was cut off stays.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from dualparal.core.rules import plan_of
from dualparal.errors import OutputError, RequestError
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.claim import delete_job, is_claimed
from dualparal.runtime.journal import JobFolder, list_jobs

log = logging.getLogger(__name__)
BYTES_PER_PIXEL = 0.3  # of H.264 at the writer's quality; seen: 0.02-0.1 for pictures, 0.3 for noise
RESERVE_BYTES = 32 * 2**20  # journal, and a margin
SAVED_COPIES = 4  # of a block in flight: its latents and what UniPC holds: two past predictions, the last sample


def bytes_needed(request: GenerationRequest) -> int:
    """What a resolved request may write: each frame twice (its segment and the mp4), finished latents, two saved sweeps (the
    new one is written before the old one goes), a reserve."""
    assert request.latents_num and request.height and request.width
    video = 2 * BYTES_PER_PIXEL * frames_of_latents(request.latents_num) * request.height * request.width
    return int(video) + request.latents_num * _latent_bytes(request) + 2 * sweep_bytes(request) + RESERVE_BYTES


def sweep_bytes(request: GenerationRequest) -> int:
    """The most that one saved sweep of a resolved request takes, without the stages' K and V of a cached left context: those
    are saved only where four times their size is free (`state.StateWriter`)."""
    assert request.num_per_block and request.num_cat is not None and request.num_inference_steps
    num_blocks, num_steps = plan_of(request).num_blocks, request.num_inference_steps
    stagger = 1 if request.schedule == "paper" else request.stagger or 1
    limit = num_blocks if request.schedule == "paper" else request.max_in_flight or 1
    in_flight = min(num_blocks, limit, -(-num_steps // stagger))
    # The ends of a neighbour that later items will see: one for each step it is ahead, and its head where experts change.
    ends = in_flight * request.num_cat * (stagger + 2)
    blocks = in_flight * request.num_per_block + request.num_cat  # the first block is longer
    copies = SAVED_COPIES
    if (request.cache_interval or 1) > 1:
        copies += (request.cache_order or 0) + 1  # predictions that skipped steps are extrapolated from
    return (copies * blocks + ends) * _latent_bytes(request)


def _latent_bytes(request: GenerationRequest) -> int:
    """Of one latent frame of a Wan VAE, float32."""
    assert request.height and request.width
    return 16 * (request.height * request.width // 64) * 4


class Storage:
    """The outputs folder as something that can be full. Thread-safe."""

    def __init__(self, outputs: Path, max_bytes: int | None = None) -> None:
        """`max_bytes`: the most that all jobs together may take, None for whatever the disk holds."""
        self._outputs, self._max_bytes = outputs, max_bytes
        self._lock = threading.Lock()
        self._sizes: dict[str, tuple[int, int]] = {}  # of ended jobs: they change only when their journal grows

    def check_free(self, request: GenerationRequest, job_id: str = "", *, after_deleting: int = 0) -> None:
        """Raise `OutputError` with the numbers when the disk has no room for what is still to be written of `request`, even
        with so many bytes more."""
        there = next((folder for folder in (self._outputs, *self._outputs.parents) if folder.is_dir()), None)
        if there is None:
            return
        needed, free = self._still_to_write(request, job_id), shutil.disk_usage(there).free
        if free + after_deleting < needed:
            raise OutputError(
                f"{self._outputs} has {_mb(free)} free and this video may need {_mb(needed)}; delete old videos or name "
                "another folder with DUALPARAL_OUTPUTS"
            )

    def make_room(
        self, request: GenerationRequest, open_jobs: Mapping[str, GenerationRequest] | None = None, *, job_id: str = ""
    ) -> list[str]:
        """Delete the oldest ended jobs until `request` fits under the limit, then check the disk; returns their ids.

        `open_jobs`, the requests that wait or run by id, stay whatever the journal says, and what they may still write is
        kept free for them; so does `job_id`, the job that is to be queued (again). Raises `OutputError` when that is not
        enough, and has deleted nothing then.
        """
        deleted: list[str] = []
        if self._max_bytes is not None:
            with self._lock:
                deleted = self._shrink(self._max_bytes, request, job_id, open_jobs or {})
        self.check_free(request, job_id)
        return deleted

    def _still_to_write(self, request: GenerationRequest, job_id: str) -> int:
        there = folder_bytes(self._outputs / job_id) if job_id else 0
        return max(0, bytes_needed(request) - there)

    def _shrink(
        self, limit: int, request: GenerationRequest, job_id: str, open_jobs: Mapping[str, GenerationRequest]
    ) -> list[str]:
        folders = list(list_jobs(self._outputs))
        sizes = {folder.job_id: self._size(folder) for folder in folders}

        def still_to_write(name: str, request: GenerationRequest) -> int:
            return max(0, bytes_needed(request) - sizes.get(name, 0))

        needed = still_to_write(job_id, request)
        if bytes_needed(request) > limit:
            raise OutputError(
                f"this video may need {_mb(bytes_needed(request))}, more than all videos kept here may take together "
                f"({_mb(limit)}); ask for a shorter or smaller one"
            )
        promised = sum(still_to_write(name, one) for name, one in open_jobs.items() if name != job_id)
        surplus = sum(sizes.values()) + promised + needed - limit
        ended = [folder for folder in reversed(folders) if folder.job_id not in (job_id, *open_jobs) and _may_go(folder)]
        if surplus > 0:
            self.check_free(request, job_id, after_deleting=sum(sizes[folder.job_id] for folder in ended))
        deleted: list[str] = []
        if surplus <= sum(sizes[folder.job_id] for folder in ended):  # else nobody shall lose a video for nothing
            for folder in ended:
                if surplus <= 0:
                    break
                try:
                    delete_job(folder)
                except (OutputError, RequestError) as error:  # or resumed meanwhile
                    log.warning("%s", error)
                    continue
                surplus -= sizes[folder.job_id]
                self._sizes.pop(folder.job_id, None)
                deleted.append(folder.job_id)
                log.info("job %s was deleted to make room", folder.job_id, extra={"job_id": folder.job_id})
        if surplus > 0:
            used = sum(sizes[folder.job_id] for folder in folders if folder not in ended) + promised
            raise OutputError(
                f"the videos kept here may take {_mb(limit)} together; {_mb(used)} are in use or promised to jobs that have "
                f"not ended, and this video may need {_mb(needed)}: try again later or ask for a shorter one"
            )
        return deleted

    def _size(self, folder: JobFolder) -> int:
        try:
            journal = (folder.path / "events.jsonl").stat().st_size
        except OSError:
            journal = -1
        known = self._sizes.get(folder.job_id)
        if known is not None and known[0] == journal:
            return known[1]
        size = folder_bytes(folder.path)
        if _has_ended(folder):
            self._sizes[folder.job_id] = journal, size
        return size


def _may_go(folder: JobFolder) -> bool:
    return _has_ended(folder) and not is_claimed(folder)


def _has_ended(folder: JobFolder) -> bool:
    try:
        return folder.final_event() is not None
    except OutputError:  # its journal cannot be read
        return False


def folder_bytes(folder: Path) -> int:
    """Bytes that the files under `folder` take on the disk; links are not followed."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += folder_bytes(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    except OSError:  # deleted meanwhile
        pass
    return total


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
