"""One replica: a group of workers that holds the model once, and the thread that watches over it.

It takes jobs from the dispatcher, one at a time (the next may start while the last is still being decoded). When a worker dies
the jobs at work end with the named cause or go on from their last saved sweep, and the group is started anew. Other replicas
do not notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from multiprocessing import Pipe
from typing import Any

from dualparal.errors import (
    CheckpointError,
    DualParalError,
    EngineError,
    RequestError,
    WorkerDied,
    WorkerFailed,
    error_from_wire,
)
from dualparal.events import Cancelled, Event, Finished, Progress
from dualparal.runtime.dispatcher import Dispatcher
from dualparal.runtime.ending import end_early, join_finished
from dualparal.runtime.gate import Gate
from dualparal.runtime.job import Job
from dualparal.runtime.launch import WorkerGroup
from dualparal.runtime.messages import (
    Beat,
    CancelJob,
    Denoised,
    JobError,
    Ready,
    Spans,
    StorePort,
    VideoClosed,
    WorkerError,
    WorkerOptions,
)
from dualparal.runtime.pulse import Pulse

log = logging.getLogger(__name__)
START_TIMEOUT_S = 1800.0  # loading 14B weights from a slow disk takes minutes
CLOSE_GRACE_S = 10.0
MAX_FAILED_STARTS = 3  # of a group that has never been ready
MAX_FAILED_RESTARTS = 10  # of one that has: what it lacks, memory or a disk, may come back in minutes
PAUSE_AFTER_FAILED_START_S = 1.0  # doubled with every further one
MAX_PAUSE_S = 60.0


class Replica:
    """One worker group behind the dispatcher's queue. `state` is starting, ready, restarting, failed or closed."""

    def __init__(self, name: str, options: WorkerOptions, desk: Dispatcher) -> None:
        self.name, self.options = name, options
        self.state = "closed"
        self.error: DualParalError | None = None  # why it is restarting or failed
        self.workers: dict[str, dict[str, Any]] = {}  # what each worker said when it was ready
        self.beats: dict[str, Beat] = {}  # each worker's last
        self.num_restarts = 0
        self.at_rank_0: Job | None = None
        self.gate: Gate | None = None  # to ranks on other hosts
        self._desk = desk
        self._decoding: dict[str, Job] = {}  # left rank 0, not yet closed by the codec
        self._to_stop: deque[Job] = deque()
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the workers in the background."""
        self.state = "starting"
        self._thread = threading.Thread(target=self._supervise, name=f"dualparal {self.name}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of everything, after the dispatcher has begun to close."""
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._desk.changed:
            self._wake_reader.close()
            self._wake_writer.close()
            self.state = "closed"

    # For the dispatcher

    def holds(self, job_id: str) -> bool:
        """Whether some worker may still be at a job of this id, even if the job has ended."""
        return job_id in self._decoding or (self.at_rank_0 is not None and self.at_rank_0.id == job_id)

    def at_work(self) -> list[Job]:
        """The jobs this replica holds, the oldest first."""
        with self._desk.changed:
            return [*self._decoding.values(), *([self.at_rank_0] if self.at_rank_0 else [])]

    def stop_job(self, job: Job) -> None:
        """Make rank 0 leave `job` at its next block step."""
        self._to_stop.append(job)
        self.wake()

    def wake(self) -> None:
        """Make the supervisor look at once."""
        with self._desk.changed, contextlib.suppress(OSError):
            self._wake_writer.send_bytes(b"x")

    # The supervisor's thread

    def _supervise(self) -> None:
        failed_starts, has_served = 0, False
        while not self._desk.is_closing:
            was_ready, error = self._run_group()
            has_served = has_served or was_ready
            failed_starts = 0 if was_ready else failed_starts + 1
            if self._desk.is_closing or error is None:
                break
            log.warning("%s: workers ended: %s", self.name, error)
            if failed_starts and _is_lasting(error, failed_starts, has_served):
                self._set_state("failed", error)
                self._desk.note_failure(error)
                return
            self.num_restarts += 1
            self._set_state("restarting", error)
            if failed_starts:
                self._pause(min(MAX_PAUSE_S, PAUSE_AFTER_FAILED_START_S * 2 ** (failed_starts - 1)))
        closed = EngineError("the engine was closed before the job was done")
        for job in self._let_go():
            if job.is_stopping:
                end_early(job, closed)
            else:
                job.fail(closed, is_stored=False)
        self._set_state("closed")

    def _pause(self, seconds: float) -> None:
        with self._desk.changed:
            self._desk.changed.wait_for(lambda: self._desk.is_closing, seconds)

    def _run_group(self) -> tuple[bool, DualParalError | None]:
        """One generation of workers, from start to end: (whether it was ever ready, what ended it)."""
        self.workers, self.beats = {}, {}
        group = WorkerGroup(self.options, self.gate)
        waiting_for = set(group.processes)
        error: DualParalError | None = None
        try:
            error = self._watch(group, waiting_for)
        except Exception as problem:
            log.exception("%s: the supervisor failed", self.name)
            error = WorkerFailed(f"the supervisor failed: {type(problem).__name__}: {problem}")
        finally:
            is_clean = error is None and not waiting_for
            group.close(CLOSE_GRACE_S if is_clean else 0.0)
        if error is not None and not self._desk.is_closing:  # else they count as cut off, whoever was ended first
            for job in self._let_go():
                if not self._desk.put_back(job, error):
                    end_early(job, error)
        return not waiting_for, error

    def _watch(self, group: WorkerGroup, waiting_for: set[str]) -> DualParalError | None:
        """Serve until something ends the group; returns what did, None at closing."""
        pulse = Pulse(time.monotonic(), self.options.timeout_s, group.far)
        self.beats = pulse.beats
        deadline_s = time.monotonic() + START_TIMEOUT_S
        error: DualParalError | None = None
        while error is None and not self._desk.is_closing:
            messages, ended, is_woken = group.receive(1.0, [self._wake_reader])
            if is_woken:
                self._wake_reader.recv_bytes()
            now_s = time.monotonic()
            pulse.look(now_s)
            for message in messages:
                match message:
                    case Beat():
                        pulse.take(message)
                    case StorePort():
                        group.share_port(message)
                    case Ready():
                        self.workers[message.name] = message.about
                        waiting_for.discard(message.name)
                        pulse.hear(message.name)  # it may hang before its first beat
                        if not waiting_for:
                            self._set_state("ready")
                    case WorkerError():
                        error = self._root_cause(group, error, message)
                    case _:
                        self._take(message, group)
            if ended and error is None:
                error = WorkerDied(f"{group.describe_end(ended[0])}")
            if error is None and (fault := pulse.fault(loading=waiting_for)) is not None:
                error = WorkerDied(fault)
            if group.missing:  # nobody knows when a host comes back
                deadline_s = now_s + START_TIMEOUT_S
            if waiting_for and now_s > deadline_s:
                error = WorkerDied(f"{min(waiting_for)} was not ready within {START_TIMEOUT_S:.0f} s")
            self._desk.store_owed()
            if not waiting_for and error is None:
                self._dispatch(group)
        return error

    def _root_cause(self, group: WorkerGroup, error: DualParalError | None, message: WorkerError) -> DualParalError:
        """The cause, not its echo: a rank whose neighbour died reports that too, often first."""
        found = error_from_wire(message.kind, message.message)
        if not isinstance(found, WorkerDied):
            return found
        deadline_s = time.monotonic() + 2.0
        while time.monotonic() < deadline_s:
            messages, ended, _ = group.receive(0.2, [])
            for other in messages:
                if not isinstance(other, WorkerError):
                    self._take(other, group)  # a block or a video may have been finished meanwhile
                elif other.kind != "WorkerDied":
                    return error_from_wire(other.kind, other.message)
            for name in ended:
                if name != message.name and group.was_killed(name):
                    return WorkerDied(group.describe_end(name))
            if ended:
                time.sleep(0.05)  # an ended process stays ready to be waited for
        return error or found

    def _dispatch(self, group: WorkerGroup) -> None:
        """Give rank 0 its next job and pass on stops."""
        with self._desk.changed:
            while self._to_stop:
                job = self._to_stop.popleft()
                if job is self.at_rank_0:
                    group.requests.put(CancelJob(job.id))
            if self.at_rank_0 is None and (next_job := self._desk.next_job(self)) is not None:
                group.requests.put(next_job.run)

    def _take(self, message: object, group: WorkerGroup) -> None:
        job_id = getattr(message, "job_id", "")
        at_rank_0 = self.at_rank_0 if self.at_rank_0 is not None and self.at_rank_0.id == job_id else None
        job = at_rank_0 or self._decoding.get(job_id)
        if job is None:
            return
        match message:
            case Progress():
                job.emit(dataclasses.replace(message, busy=job.busy(self.options.ranks)))
            case Event():
                job.emit(message)
            case Spans():
                job.add_spans(message.spans)
            case Denoised():
                with self._desk.changed:
                    self.at_rank_0 = None
                    if not job.has_ended:
                        self._decoding[job.id] = job
            case VideoClosed():
                job.keep_latents(message.latents)
                if message.is_cancelled and message.num_frames < sum(block.num_frames for block in job.view().blocks):
                    # It was resumed, and stopped before it had come by all blocks of the run before.
                    path, num_frames = join_finished(job)
                    if path is not None:  # else the disk is full, and the shorter one is there
                        message = dataclasses.replace(message, path=path, num_frames=num_frames)
                job.emit(_final_event(job, message))
                self._drop(job)
            case JobError():
                if at_rank_0:
                    group.requests.put(CancelJob(job.id))
                end_early(job, error_from_wire(message.kind, message.message))
                self._drop(job)

    def _drop(self, job: Job) -> None:
        with self._desk.changed:
            self._decoding.pop(job.id, None)

    def _let_go(self) -> list[Job]:
        """The jobs at work, which nobody works on any more."""
        with self._desk.changed:
            at_work = [job for job in self.at_work() if not job.has_ended]
            self.at_rank_0 = None
            self._decoding.clear()
            self._to_stop.clear()
        return at_work

    def _set_state(self, state: str, error: DualParalError | None = None) -> None:
        with self._desk.changed:
            self.state, self.error = state, error
            self._desk.changed.notify_all()


def _is_lasting(error: DualParalError, failed_starts: int, has_served: bool) -> bool:
    """Whether workers that cannot start will not be able to the next time either.

    At first anything but a death is: an option or a model that does not work. Once they have served, only a checkpoint or an
    option is; memory, disks and drivers recover.
    """
    if not has_served:
        return not isinstance(error, WorkerDied) or failed_starts >= MAX_FAILED_STARTS
    return isinstance(error, CheckpointError | RequestError) or failed_starts >= MAX_FAILED_RESTARTS


def _final_event(job: Job, message: VideoClosed) -> Event:
    if message.is_cancelled:
        return Cancelled(job_id=job.id, path=message.path, num_frames=message.num_frames)
    timings = {**message.timings, "total_s": job.seconds_since_submit()}
    if job.first_frames_s is not None:
        timings["first_frames_s"] = job.first_frames_s
    assert message.path is not None
    return Finished(job_id=job.id, path=message.path, num_frames=message.num_frames, timings=timings)
