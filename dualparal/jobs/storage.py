"""Room on the disk: what a video will need, whether it is there, and a limit kept by deleting one's own oldest ended jobs.

Only whole job folders go, only those of jobs that have ended in the journal; what waits, runs or was cut off stays.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from dualparal.errors import OutputError, RequestError
from dualparal.jobs.claim import delete_job, is_claimed
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.method.rules import plan_of
from dualparal.planning.disk import bytes_needed, sweep_bytes
from dualparal.request import Settings

log = logging.getLogger(__name__)
BLOCKS_TO_SPARE = 4  # that an endless film may make before anybody looks again
MAY_GO_AFTER_S = 7 * 86400.0  # of other people's videos: else a full server would take no newcomer


class Storage:
    """The outputs folder as something that can be full. Thread-safe."""

    def __init__(self, outputs: Path, max_bytes: int | None = None) -> None:
        """`max_bytes`: the most that all jobs together may take, None for whatever the disk holds."""
        self._outputs, self._max_bytes = outputs, max_bytes
        self._lock = threading.Lock()
        self._sizes: dict[str, tuple[int, int]] = {}  # of ended jobs: they change only when their journal grows

    def check_free(self, request: Settings, job_id: str = "", *, after_deleting: int = 0) -> None:
        """Raise `OutputError` with the numbers when the disk has no room for what is still to be written of `request`, even
        with so many bytes more."""
        there = next((folder for folder in (self._outputs, *self._outputs.parents) if folder.is_dir()), None)
        if there is None:
            return
        needed, free = self._still_to_write(request, job_id), shutil.disk_usage(there).free
        if free + after_deleting < needed:
            raise OutputError(
                f"the outputs folder has {_mb(free)} free and this video may need {_mb(needed)}; delete old videos or name "
                "another one with DUALPARAL_OUTPUTS"
            )

    def make_room(
        self, request: Settings, open_jobs: Mapping[str, Settings] | None = None, *, job_id: str = "",
        owner: str = "", keep: Collection[str] = (),
    ) -> list[str]:  # fmt: skip
        """Delete the oldest ended jobs of `owner` until `request` fits under the limit, then check the disk; returns their ids.

        Videos of others stay, unless they have lain there for `MAY_GO_AFTER_S`.
        `open_jobs`, the requests that wait or run by id, stay whatever the journal says, and what they may still write is
        kept free for them; so do `job_id`, the job that is to be queued (again), and jobs to `keep`. Raises `OutputError` when
        that is not enough, and has deleted nothing then.
        """
        deleted: list[str] = []
        if self._max_bytes is not None:
            with self._lock:
                deleted = self._shrink(self._max_bytes, request, job_id, owner, open_jobs or {}, keep)
        self.check_free(request, job_id)
        return deleted

    def has_room_for_more(self, request: Settings, job_id: str, begun: float = 1.0) -> bool:
        """Whether an endless film that is under way may grow: what will be there of it, `begun` times what is there now (blocks
        may wait to be decoded), once more for the joined video, and the blocks that may be in flight fit on the disk and under
        the limit."""
        folder = self._outputs / job_id
        there = folder_bytes(folder)
        plan = plan_of(request)
        ahead = (request.max_in_flight + BLOCKS_TO_SPARE) * request.num_per_block / max(1, plan.latents_num)
        needed = int(there * (2 * begun - 1)) + int(min(1.0, ahead) * bytes_needed(request)) + sweep_bytes(request)
        if shutil.disk_usage(self._outputs).free < needed:
            return False
        if self._max_bytes is None:
            return True
        with self._lock:
            used = sum(self._size(one) for one in list_jobs(self._outputs))
        return used + needed <= self._max_bytes

    def _still_to_write(self, request: Settings, job_id: str) -> int:
        there = folder_bytes(self._outputs / job_id) if job_id else 0
        return max(0, bytes_needed(request) - there)

    def _shrink(
        self, limit: int, request: Settings, job_id: str, owner: str, open_jobs: Mapping[str, Settings], keep: Collection[str]
    ) -> list[str]:
        folders = list(list_jobs(self._outputs))
        sizes = {folder.job_id: self._size(folder) for folder in folders}

        def still_to_write(name: str, request: Settings) -> int:
            return max(0, bytes_needed(request) - sizes.get(name, 0))

        needed = still_to_write(job_id, request)
        if bytes_needed(request) > limit:
            raise OutputError(
                f"this video may need {_mb(bytes_needed(request))}, more than all videos kept here may take together "
                f"({_mb(limit)}); ask for a shorter or smaller one"
            )
        promised = sum(still_to_write(name, one) for name, one in open_jobs.items() if name != job_id)
        surplus = sum(sizes.values()) + promised + needed - limit
        own: list[JobFolder] = []
        old: list[JobFolder] = []
        for folder in reversed(folders) if surplus > 0 else ():
            if folder.job_id not in (job_id, *open_jobs, *keep) and _may_go(folder):
                (own if _owner(folder) == owner else old if _is_old(folder) else []).append(folder)
        ended = [*own, *old]
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
                f"not ended, or other people's, and this video may need {_mb(needed)}: try again later or ask for a shorter one"
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


def _owner(folder: JobFolder) -> str | None:
    """None where the record is damaged: nobody's video, which only goes for its age."""
    try:
        return str(folder.record().get("owner") or "")
    except OutputError:
        return None


def _is_old(folder: JobFolder) -> bool:
    try:
        return time.time() - (folder.path / "events.jsonl").stat().st_mtime > MAY_GO_AFTER_S
    except OSError:
        return False


def _has_ended(folder: JobFolder) -> bool:
    try:
        return folder.final_event() is not None
    except OutputError:  # its journal cannot be read
        return False


def folder_bytes(folder: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Bytes that the files under `folder` take on the disk, each counted once whatever its names; links are not followed."""
    total = 0
    seen = set() if seen is None else seen
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += folder_bytes(Path(entry.path), seen)
                elif (about := entry.stat(follow_symlinks=False)) and (about.st_dev, about.st_ino) not in seen:
                    seen.add((about.st_dev, about.st_ino))
                    total += about.st_blocks * 512
    except OSError:  # deleted meanwhile
        pass
    return total


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
