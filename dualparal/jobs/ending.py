"""How a job ends that does not finish: its finished blocks become a playable mp4 all the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from dualparal.errors import DualParalError
from dualparal.events import BlockReady, Cancelled
from dualparal.files import is_whole_segment
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.job import Job
from dualparal.media.writer import Segment, VideoWriter, remove_partials
from dualparal.request import Settings

log = logging.getLogger(__name__)


def join_finished(job: Job) -> tuple[str | None, int]:
    """(the mp4 of the blocks finished so far, their frames); (None, 0) when there is none or it cannot be written."""
    return (None, 0) if job.has_ended else join_blocks(job.folder, job.request, job.view().blocks)


def join_blocks(folder: JobFolder, request: Settings, blocks: Sequence[BlockReady]) -> tuple[str | None, int]:
    """`join_finished` for the told `blocks` of a folder that nobody writes to any more."""
    if not blocks:
        with contextlib.suppress(OSError):
            remove_partials(folder.path)
        return None, 0
    listed = [Segment(Path(b.path), b.first_frame, b.num_frames, b.duration_s, b.checksum) for b in blocks]
    segments = list(takewhile(lambda one: not one.checksum or is_whole_segment(one.path, one.checksum), listed))
    if len(segments) < len(listed):
        name = listed[len(segments)].path.name
        log.warning(
            "job %s: %s is damaged, so that its video ends before", folder.job_id, name, extra={"job_id": folder.job_id}
        )
    try:
        remove_partials(folder.path)
        writer = VideoWriter(
            folder.path, width=request.width, height=request.height, fps=request.fps, segments=segments,
            num_frames_before=request.num_frames_before,
        )  # fmt: skip
        return str(writer.finish(request.to_json())), writer.num_frames
    except (OSError, ValueError) as error:
        log.error("job %s: the finished blocks could not be joined: %s", folder.job_id, error, extra={"job_id": folder.job_id})
        return None, 0


def end_early(job: Job, error: DualParalError) -> None:
    """End a job that cannot go on: stopped if that was asked for, else failed with `error`."""
    path, num_frames = join_finished(job)
    if job.is_stopping:
        job.emit(Cancelled(job_id=job.id, path=path, num_frames=num_frames))
    else:
        job.fail(error, path=path, num_frames=num_frames)


def end_surely(job: Job, error: DualParalError) -> None:
    """`end_early`, and where even that fails (no file, no memory) the end without the blocks joined: nobody waits for ever."""
    try:
        end_early(job, error)
    except Exception:
        log.exception("job %s: its finished blocks were not joined", job.id, extra={"job_id": job.id})
        job.fail(error)
