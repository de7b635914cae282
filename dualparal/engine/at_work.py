"""The jobs that one group of workers is at, and what the workers' messages mean for them.

One job at a time is denoised; the one before may still be decoded. Knows no process and no thread.
"""

from __future__ import annotations

import dataclasses

from dualparal.engine.dispatcher import Dispatcher
from dualparal.errors import error_from_wire
from dualparal.events import Cancelled, Event, Finished, Look, Progress
from dualparal.jobs.ending import end_surely, join_finished
from dualparal.jobs.job import Job
from dualparal.messages import Denoised, JobError, Spans, SteerAnswer, VideoClosed


class JobsAtWork:
    """What a group holds; the dispatcher's lock guards it."""

    def __init__(self, dispatcher: Dispatcher, stages: tuple[str, ...]) -> None:
        self.at_rank_0: Job | None = None
        self._dispatcher, self._stages = dispatcher, stages
        self._decoding: dict[str, Job] = {}  # left rank 0, not yet closed by the codec

    def holds(self, job_id: str) -> bool:
        """Whether some worker may still be at a job of this id, even if the job has ended."""
        return job_id in self._decoding or (self.at_rank_0 is not None and self.at_rank_0.id == job_id)

    def at_work(self) -> list[Job]:
        """The jobs held, the oldest first."""
        with self._dispatcher.changed:
            return [*self._decoding.values(), *([self.at_rank_0] if self.at_rank_0 else [])]

    def take(self, message: object) -> None:
        """Tell the job of a worker's message; what belongs to no job held here is dropped."""
        job_id = getattr(message, "job_id", "")
        at_rank_0 = self.at_rank_0 if self.at_rank_0 is not None and self.at_rank_0.id == job_id else None
        job = at_rank_0 or self._decoding.get(job_id)
        if job is None:
            return
        match message:
            case Progress():
                job.emit(dataclasses.replace(message, busy=job.timeline.busy(self._stages)))
            case Look():
                job.show(message)
            case SteerAnswer():
                job.take_answer(message)
            case Event():
                job.emit(message)
            case Spans():
                job.timeline.add(message.spans)
            case Denoised():
                with self._dispatcher.changed:
                    self.at_rank_0 = None
                    if not job.has_ended:
                        self._decoding[job.id] = job
            case VideoClosed():
                self._close(job, message)
                self._drop(job)
            case JobError():
                end_surely(job, error_from_wire(message.kind, message.message))
                self._drop(job)

    def let_go(self) -> list[Job]:
        """Those that have not ended, on which nobody works any more."""
        with self._dispatcher.changed:
            left = [job for job in self.at_work() if not job.has_ended]
            self.at_rank_0 = None
            self._decoding.clear()
        return left

    def _close(self, job: Job, message: VideoClosed) -> None:
        job.keep_latents(message.latents)
        if message.is_cancelled and message.num_frames < sum(block.num_frames for block in job.view().blocks):
            # It was resumed, and stopped before it had come by all blocks of the run before.
            path, num_frames = join_finished(job)
            if path is not None:  # else the disk is full, and the shorter one is there
                message = dataclasses.replace(message, path=path, num_frames=num_frames)
        job.emit(_final_event(job, message))

    def _drop(self, job: Job) -> None:
        with self._dispatcher.changed:
            self._decoding.pop(job.id, None)


def _final_event(job: Job, message: VideoClosed) -> Event:
    if message.is_cancelled:
        is_resting = job.run.rest_at > 0 and not job.is_stopping
        return Cancelled(job_id=job.id, path=message.path, num_frames=message.num_frames, is_resting=is_resting)
    timings = {**message.timings, "total_s": job.seconds_since_submit()}
    if job.first_frames_s is not None:
        timings["first_frames_s"] = job.first_frames_s
    assert message.path is not None
    return Finished(job_id=job.id, path=message.path, num_frames=message.num_frames, timings=timings)
