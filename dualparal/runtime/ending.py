"""How a job ends that does not finish: its finished blocks become a playable mp4 all the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dualparal.errors import DualParalError, OutputError
from dualparal.events import BlockReady, Cancelled
from dualparal.media.writer import Segment, VideoWriter, remove_partials
from dualparal.request import GenerationRequest
from dualparal.runtime.job import Job
from dualparal.runtime.journal import JobFolder

log = logging.getLogger(__name__)


def join_finished(job: Job) -> tuple[str | None, int]:
    """(the mp4 of the blocks finished so far, their frames); (None, 0) when there is none or it cannot be written."""
    return (None, 0) if job.has_ended else join_blocks(job.folder, job.request, job.view().blocks)


def join_blocks(folder: JobFolder, request: GenerationRequest, blocks: Sequence[BlockReady]) -> tuple[str | None, int]:
    """`join_finished` for the told `blocks` of a folder that nobody writes to any more."""
    remove_partials(folder.path)
    if not blocks:
        return None, 0
    assert request.fps and request.height and request.width
    segments = [Segment(Path(b.path), b.first_frame, b.num_frames, b.duration_s) for b in blocks]
    try:
        writer = VideoWriter(folder.path, width=request.width, height=request.height, fps=request.fps, segments=segments)
        return str(writer.finish(request.to_json())), writer.num_frames
    except (OutputError, ValueError) as error:
        log.error("job %s: the finished blocks could not be joined: %s", folder.job_id, error, extra={"job_id": folder.job_id})
        return None, 0


def end_early(job: Job, error: DualParalError) -> None:
    """End a job that cannot go on: stopped if that was asked for, else failed with `error`."""
    path, num_frames = join_finished(job)
    if job.is_stopping:
        job.emit(Cancelled(job_id=job.id, path=path, num_frames=num_frames))
    else:
        job.fail(error, path=path, num_frames=num_frames)
