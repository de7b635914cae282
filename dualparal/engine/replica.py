"""One replica: a group of workers that holds the model once, and the thread that watches over it.

It takes jobs from the dispatcher, one at a time (the next may start while the last is still being decoded). When a worker dies
the jobs at work end with the named cause or go on from their last saved sweep, and the group is started anew. Other replicas
do not notice. Whatever goes wrong on this side of the workers (no file can be opened, no semaphore made) is a failed start: the
thread itself never ends before the engine does, or before the replica has failed for good and says why.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from multiprocessing import Pipe
from typing import Any

from dualparal.engine.at_work import JobsAtWork
from dualparal.engine.dispatcher import Dispatcher
from dualparal.engine.pulse import Pulse
from dualparal.engine.worker_group import WorkerGroup
from dualparal.errors import CheckpointError, DualParalError, EngineError, RequestError, WorkerDied, error_from_wire
from dualparal.hosts.listener import HostListener
from dualparal.jobs.ending import end_surely
from dualparal.jobs.job import Job
from dualparal.messages import Beat, CancelJob, Finish, JobError, Played, Ready, Steer, StorePort, WorkerError, WorkerOptions

log = logging.getLogger(__name__)
START_TIMEOUT_S = 1800.0  # loading 14B weights from a slow disk takes minutes; one that reads nothing is noticed before
CLOSE_GRACE_S = 10.0
MAX_FAILED_STARTS = 3  # of a group that has never been ready
MAX_FAILED_RESTARTS = 10  # of one that has, or where the fault is ours: memory, files or a disk may come back in minutes
PAUSE_AFTER_FAILED_START_S = 1.0  # doubled with every further one
MAX_PAUSE_S = 60.0
LOOK_EVERY_S = 1.0
STUCK_S = 120.0  # a supervisor looks every second; the longest that it does besides is to join a video's blocks


class Replica(JobsAtWork):
    """One worker group behind the dispatcher's queue. `state` is starting, ready, restarting, failed or closed."""

    def __init__(self, name: str, options: WorkerOptions, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher, options.grid.names)
        self.name, self.options = name, options
        self.state = "closed"
        self.error: DualParalError | None = None  # why it is restarting or failed
        self.workers: dict[str, dict[str, Any]] = {}  # what each worker said when it was ready
        self.beats: dict[str, Beat] = {}  # each worker's last
        self.num_restarts = 0
        self.listener: HostListener | None = None  # to ranks on other hosts
        self._to_stop: deque[Job] = deque()
        self._to_steer: deque[Steer | Finish | Played] = deque()
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._thread: threading.Thread | None = None
        self._num_failed_starts, self._has_served = 0, False
        self._looked_s = time.monotonic()

    def start(self) -> None:
        """Start the workers in the background."""
        self.state, self._looked_s = "starting", time.monotonic()
        self._thread = threading.Thread(target=self._supervise, name=f"dualparal {self.name}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of everything, after the dispatcher has begun to close."""
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._dispatcher.changed:
            self._wake_reader.close()
            self._wake_writer.close()
            self.state = "closed"

    @property
    def is_stuck(self) -> bool:
        """Whether the supervisor, or the queue whose lock it takes, has not moved for `STUCK_S`. Never waits."""
        return self.state not in ("closed", "failed") and time.monotonic() - self._looked_s > STUCK_S

    # For the dispatcher

    def stop_job(self, job: Job) -> None:
        """Make rank 0 leave `job` at its next block step."""
        self._to_stop.append(job)
        self.wake()

    def steer_job(self, wish: Steer | Finish | Played) -> None:
        """Tell rank 0 how the job that it is at goes on, or how far it has been watched."""
        self._to_steer.append(wish)
        self.wake()

    def wake(self) -> None:
        """Make the supervisor look at once."""
        with self._dispatcher.changed, contextlib.suppress(OSError):
            if not self._wake_reader.poll():  # one call is enough, and a full pipe would hold up whoever calls
                self._wake_writer.send_bytes(b"x")

    # The supervisor's thread

    def _supervise(self) -> None:
        while not self._dispatcher.is_closing and self.state != "failed":
            try:
                self._live()
            except Exception as problem:  # its own guards had no memory or no file either
                log.exception("%s: the supervisor failed", self.name)
                self._pause(min(MAX_PAUSE_S, PAUSE_AFTER_FAILED_START_S))
                self.error = _own_fault(problem)
        closed = EngineError("the engine was closed before the job was done")
        for job in self.let_go():
            if job.is_stopping:
                end_surely(job, closed)
            else:
                job.fail(closed, is_stored=False)
        if self.state != "failed":
            self._set_state("closed")

    def _live(self) -> None:
        """One group from start to end, and what follows from its end."""
        was_ready, error = self._run_group(WorkerGroup)
        self._has_served = self._has_served or was_ready
        self._num_failed_starts = 0 if was_ready else self._num_failed_starts + 1
        if self._dispatcher.is_closing or error is None:
            return
        log.warning("%s: workers ended: %s", self.name, error)
        if self._num_failed_starts and _is_lasting(error, self._num_failed_starts, self._has_served):
            self._set_state("failed", error)
            self._dispatcher.replica_failed(error)
            return
        self.num_restarts += 1
        self._set_state("restarting", error)
        if self._num_failed_starts:
            self._pause(min(MAX_PAUSE_S, PAUSE_AFTER_FAILED_START_S * 2 ** (self._num_failed_starts - 1)))

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._dispatcher.is_closing and (left_s := until_s - time.monotonic()) > 0:
            with self._dispatcher.changed:
                self._dispatcher.changed.wait_for(lambda: self._dispatcher.is_closing, min(left_s, LOOK_EVERY_S))
            self._dispatcher.hear_wishes()
            self._looked_s = time.monotonic()

    def _run_group(self, make: type[WorkerGroup], grace_s: float = CLOSE_GRACE_S) -> tuple[bool, DualParalError | None]:
        """One generation of workers: (whether it was ever ready, what ended it)."""
        self.workers, self.beats = {}, {}
        waiting_for = {"every worker"}
        group: WorkerGroup | None = None
        error: DualParalError | None = None
        try:
            group = make(self.options, self.listener)
            waiting_for = set(group.processes)
            error = self._watch(group, waiting_for)
        except Exception as problem:
            log.exception("%s: the supervisor failed", self.name)
            error = _own_fault(problem)
        finally:
            if group is not None:
                group.close(grace_s if error is None and not waiting_for else 0.0)
            self._to_stop.clear()
            self._to_steer.clear()
            if not self._dispatcher.is_closing:  # else they count as cut off, whoever was ended first
                self._end_jobs(error or EngineError("it was stopped"))
        return not waiting_for, error

    def _end_jobs(self, error: DualParalError) -> None:
        for job in self.let_go():
            if not self._dispatcher.put_back(job, error):
                end_surely(job, error)

    def _watch(self, group: WorkerGroup, waiting_for: set[str]) -> DualParalError | None:
        """Serve until something ends the group; returns what did, None at closing or when its work is done."""
        pulse = Pulse(time.monotonic(), self.options.engine.timeout_s, group.far)
        self.beats = pulse.beats
        deadline_s = time.monotonic() + START_TIMEOUT_S
        error: DualParalError | None = None
        while error is None and not self._dispatcher.is_closing and self._serve(group, is_ready=not waiting_for):
            messages, ended, is_woken = group.receive(LOOK_EVERY_S, [self._wake_reader])
            if is_woken:
                self._wake_reader.recv_bytes()
            self._looked_s = now_s = time.monotonic()
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
                        self._hand_on(message, group)
            if ended and error is None:
                error = WorkerDied(f"{group.describe_end(ended[0])}")
            if group.missing:  # nobody knows when a host comes back
                deadline_s = now_s + START_TIMEOUT_S
                pulse.wait_on()
            if error is None and (fault := pulse.fault(loading=waiting_for)) is not None:
                error = WorkerDied(fault)
            if waiting_for and now_s > deadline_s:
                error = WorkerDied(f"{min(waiting_for)} was not ready within {START_TIMEOUT_S:.0f} s")
            self._dispatcher.store_owed()
            self._dispatcher.hear_wishes()
            self._dispatcher.wrap_up_due()
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
                    self._hand_on(other, group)  # a block or a video may have been finished meanwhile
                elif other.kind != "WorkerDied":
                    return error_from_wire(other.kind, other.message)
            for name in ended:
                if name != message.name and group.was_killed(name):
                    return WorkerDied(group.describe_end(name))
            if ended:
                time.sleep(0.05)  # an ended process stays ready to be waited for
        return error or found

    def _serve(self, group: WorkerGroup, *, is_ready: bool) -> bool:
        """Give rank 0 its next job and pass on stops, once all are there. Whether the group is wanted any longer."""
        with self._dispatcher.changed:
            while is_ready and self._to_stop:
                job = self._to_stop.popleft()
                if job is self.at_rank_0:
                    group.requests.put(CancelJob(job.id))
            while is_ready and self._to_steer:
                group.requests.put(self._to_steer.popleft())
            if is_ready and self.at_rank_0 is None and (next_job := self._dispatcher.next_job(self)) is not None:
                group.requests.put(next_job.run)
        return True

    def _hand_on(self, message: object, group: WorkerGroup) -> None:
        if isinstance(message, JobError) and self.at_rank_0 is not None and self.at_rank_0.id == message.job_id:
            group.requests.put(CancelJob(message.job_id))
        self.take(message)

    def _set_state(self, state: str, error: DualParalError | None = None) -> None:
        with self._dispatcher.changed:
            self.state, self.error = state, error
            self._dispatcher.changed.notify_all()


def _own_fault(problem: Exception) -> EngineError:
    """What went wrong on this side of the workers: exactly an `EngineError`."""
    return EngineError(f"the supervisor failed: {type(problem).__name__}: {problem}")


def _is_lasting(error: DualParalError, num_failed_starts: int, has_served: bool) -> bool:
    """Whether workers that cannot start will not be able to the next time either.

    At first anything but a death is: an option or a model that does not work. Once they have served, only a checkpoint or an
    option is; memory, disks and drivers recover. So may what was lacking here.
    """
    if not has_served and type(error) is not EngineError:
        return not isinstance(error, WorkerDied) or num_failed_starts >= MAX_FAILED_STARTS
    return isinstance(error, CheckpointError | RequestError) or num_failed_starts >= MAX_FAILED_RESTARTS
