"""The dispatcher between those who submit jobs and the replicas that run them: who waits, who is at work, who goes next.

Every job that has not ended is in exactly one place: in the queue (comparisons in one of their own), or held by one replica.
Thread-safe; `changed` is the lock.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from dualparal.engine.tally import Tally
from dualparal.errors import DualParalError, EngineError, OutOfMemory, OutputError
from dualparal.events import Cancelled, Queued
from dualparal.jobs.ending import end_surely, join_finished
from dualparal.jobs.job import Job
from dualparal.jobs.queue import JobQueue
from dualparal.locks import SafeCondition
from dualparal.messages import TOO_LATE, Finish, Played, Steer, SteerAnswer

log = logging.getLogger(__name__)
LOOK_FOR_ROOM_S = 1.0
KEEP_ENDED = 32  # ended jobs kept in memory; all are on disk
MAX_INTERRUPTIONS = 1  # how often a job goes on by itself
STATES = ("ready", "starting", "restarting", "failed")  # of an engine: the best of its replicas'


class Group(Protocol):
    """What the dispatcher asks of a replica."""

    state: str
    error: DualParalError | None
    at_rank_0: Job | None

    def holds(self, job_id: str) -> bool: ...
    def at_work(self) -> list[Job]: ...
    def stop_job(self, job: Job) -> None: ...
    def steer_job(self, wish: Steer | Finish | Played) -> None: ...
    def wake(self) -> None: ...


class Dispatcher:
    """Hands queued jobs to replicas, one at a time each."""

    def __init__(
        self, queue: JobQueue[Job], *, auto_resume: bool, check: Callable[[Job], None] = lambda _: None,
        has_room: Callable[[Job], bool] = lambda _: True, turn_s: float = math.inf,
    ) -> None:  # fmt: skip
        """`check` is called before a job is handed out: it waits on, and all behind it, while that raises `OutputError` (a full
        disk). `has_room`: whether an endless film may go on as far as it is planned. One that is `turn_s` seconds long
        gives way to jobs that wait."""
        self.changed = SafeCondition()
        self.queue = queue
        self.comparisons: JobQueue[Job] = JobQueue()  # shares the limits of `queue`
        self.replicas: Sequence[Group] = ()
        self.comparer: Group | None = None
        self.tally = Tally()
        self.is_closing = False
        self._auto_resume, self._check, self._has_room = auto_resume, check, has_room
        self._turn_s = turn_s
        self._looked_s = 0.0  # whether endless films may go on
        self._jobs: dict[str, Job] = {}
        self._ended: deque[str] = deque()
        self._short: tuple[str, str] = ("", "")  # the job that waits for room on the disk, and in whose words
        self._owed: list[Job] = []  # ended, and a full disk has not taken all their events
        self._hearing = threading.Lock()

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or closed; ready as soon as one replica is."""
        found = {replica.state for replica in self.replicas}
        return next((state for state in STATES if state in found), "closed")

    def failure(self) -> DualParalError:
        """Why no more jobs are taken."""
        if self.state == "failed" and (error := next((r.error for r in self.replicas if r.error), None)) is not None:
            return error
        return EngineError("the engine is closed; start a new one")

    # For those who submit

    def check_open(self) -> None:
        """Raise `failure` when the engine is closing or every replica has failed."""
        if self.is_closing or self.state == "failed":
            raise self.failure()

    def add(self, job: Job) -> None:
        """Put a job in the queue, whose folder says so already. Raises as `check_open`."""
        with self.changed:
            self.check_open()
            self._jobs[job.id] = job
            self._queue_of(job).push(job, job.owner)
            self.tally.submitted()
            self._tell_positions()
        self._wake()

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def jobs(self) -> list[Job]:
        """Jobs that have not ended: those at work first, then the queue in the order they will run."""
        with self.changed:
            comparing = self.comparer.at_work() if self.comparer else []
            return [job for job in (*self._at_work(), *self.queue, *comparing, *self.comparisons) if not job.has_ended]

    def check_room(self, owner: str) -> None:
        """Raise `QueueFull` unless `owner` may add a job."""
        with self.changed:
            waiting = list(self.comparisons)
            own = [job for group in self._groups() for job in group.at_work() if not job.has_ended] + waiting
            self.queue.check_room(owner, sum(job.owner == owner for job in own), num_elsewhere=len(waiting))

    def cancel(self, job: Job) -> None:
        """Stop a job: a waiting one ends here, a running one at the next block step."""
        with self.changed:
            is_waiting = self._queue_of(job).remove(job)
            if is_waiting:
                self._tell_positions()
            else:
                job.is_stopping = True
                with contextlib.suppress(OSError):  # a full disk: the wish is known here all the same
                    job.folder.stop_wish.touch()
                for group in self._groups():
                    if group.at_rank_0 is job:
                        group.stop_job(job)
        if is_waiting:
            path, num_frames = join_finished(job)
            job.emit(Cancelled(job_id=job.id, path=path, num_frames=num_frames))

    def steer(self, job: Job, wish: Steer | Finish | Played) -> None:
        """Hand a wish, or what is played, to the workers that denoise the job; where none do, a wish is refused."""
        with self.changed:
            for group in self.replicas:
                if group.at_rank_0 is job:
                    group.steer_job(wish)
                    return
        if not isinstance(wish, Played):
            job.take_answer(SteerAnswer(job.id, wish.number, refusal=TOO_LATE))

    def hear_wishes(self) -> None:
        """Stop the jobs that another program has asked to stop (`jobs.stopping`). Never raises."""
        if not self._hearing.acquire(blocking=False):  # one replica's supervisor is enough
            return
        try:
            for job in self.jobs():
                if not job.is_stopping and os.path.exists(job.folder.stop_wish):
                    log.info("job %s is stopped by another program", job.id, extra={"job_id": job.id})
                    job.cancel()
        except Exception:
            log.exception("jobs could not be stopped")
        finally:
            self._hearing.release()

    def wrap_up_due(self) -> None:
        """End endless films for which there is no more room on the disk, or which have had their turn. Never raises."""
        if time.monotonic() < self._looked_s + LOOK_FOR_ROOM_S:
            return
        self._looked_s = time.monotonic()
        try:
            for job in self.jobs():
                is_going_on = job.request.is_endless and job.state == "running" and not job.is_stopping
                if is_going_on and (why := self._why_end(job)) is not None:
                    log.warning("job %s is wrapped up: %s", job.id, why, extra={"job_id": job.id})
                    self.steer(job, Finish(job.id, 0))
        except Exception:
            log.exception("endless films could not be wrapped up")

    def _why_end(self, job: Job) -> str | None:
        if not self._has_room(job):
            return "the disk is full"
        blocks = job.view().blocks
        length_s = (blocks[-1].first_frame + blocks[-1].num_frames) / job.request.fps if blocks else 0.0
        if len(self.queue) and length_s >= self._turn_s:
            return f"others wait, and it is as long as a film may be here ({self._turn_s:g} s)"
        return None

    def forget(self, job_id: str) -> None:
        """Drop an ended job from memory (its files stay)."""
        with self.changed:
            if (job := self._jobs.get(job_id)) and job.has_ended:
                del self._jobs[job_id]

    # For replicas

    def next_job(self, replica: Group) -> Job | None:
        """The job whose turn it is, from now on held by `replica`."""
        with self.changed:
            if self.is_closing:
                return None
            job = self.queue.pop(lambda job: not any(other.holds(job.id) for other in self.replicas))
            if job is None:
                return None
            try:
                self._check(job)
            except OutputError as error:  # replicas ask again every second
                self.queue.put_back(job)
                self._tell_short(job, str(error))
                return None
            self._short = ("", "")
            replica.at_rank_0 = job
            self._tell_positions()
            return job

    def next_comparison(self, comparer: Group) -> Job | None:
        """The comparison whose turn it is once none of the other jobs waits or is at work, from now on held by `comparer`."""
        with self.changed:
            if self.is_closing or len(self.queue) or any(not job.has_ended for job in self._at_work()):
                return None
            comparer.at_rank_0 = self.comparisons.pop()
            return comparer.at_rank_0

    def _tell_short(self, job: Job, reason: str) -> None:
        if self._short[0] != job.id:  # the numbers change all the time
            self._short = (job.id, reason)
            log.warning("job %s waits: %s", job.id, reason, extra={"job_id": job.id})
            self._tell_positions()

    def put_back(self, job: Job, error: DualParalError) -> bool:
        """Whether `job`, cut off by `error`, goes on by itself: once, from its last saved sweep, before all others."""
        with self.changed:
            if not self._auto_resume or self.is_closing or job.has_ended or job.is_stopping:
                return False
            # What did not fit will not fit the next time either.
            if job.num_interruptions >= MAX_INTERRUPTIONS or isinstance(error, OutOfMemory):
                return False
            log.warning("job %s was cut off and goes on by itself: %s", job.id, error, extra={"job_id": job.id})
            job.interrupt(error)
            self.tally.interrupted()
            self.queue.push_first(job)
            self._tell_positions(is_new=job)
        self._wake()
        return True

    def replica_failed(self, error: DualParalError) -> None:
        """A replica has failed for good; when it was the last one, nobody is left to run what waits."""
        with self.changed:
            is_last = all(replica.state == "failed" for replica in self.replicas)
        if is_last:
            self.end_all(error, is_stored=True)

    def end_all(self, error: DualParalError, *, is_stored: bool) -> None:
        """Fail every job that waits."""
        with self.changed:
            waiting = [*self.queue, *self.comparisons]
            self.queue.clear()
            self.comparisons.clear()
        for job in waiting:
            if is_stored:
                end_surely(job, error)
            else:
                job.fail(error, is_stored=False)

    def job_ended(self, job: Job) -> None:
        """An ended job is counted, and forgotten when enough others have ended after it."""
        is_stored = job.store_rest()
        with self.changed:
            if not is_stored:
                self._owed.append(job)
            self.tally.ended(job)
            self._ended.append(job.id)
            while len(self._ended) > KEEP_ENDED:
                self.forget(self._ended.popleft())

    def store_owed(self, *, is_last: bool = False) -> None:
        """Write what could not be written when jobs ended; the last time, jobs of which the disk still knows no end are let go
        and count as cut off."""
        with self.changed:
            owed, self._owed = self._owed, []
        left = [job for job in owed if not job.store_rest()]
        if is_last:
            for job in left:
                job.release()
            return
        with self.changed:
            self._owed += left

    def _tell_positions(self, is_new: Job | None = None) -> None:
        ahead = self._num_ahead()
        for place, job in enumerate(self.queue):
            reason = self._short[1] if job.id == self._short[0] else ""
            queued = Queued(job_id=job.id, position=place + ahead, reason=reason, owner=job.owner)
            job.emit(queued, is_stored=job is is_new)

    def next_position(self) -> int:
        """Jobs that would be ahead of one more."""
        with self.changed:
            return len(self.queue) + self._num_ahead()

    def _num_ahead(self) -> int:
        """Jobs at work that the first in the queue waits for: none while a replica is free."""
        busy = sum(replica.at_rank_0 is not None for replica in self.replicas)
        return max(0, busy - (len(self.replicas) - 1))

    def _queue_of(self, job: Job) -> JobQueue[Job]:
        return self.comparisons if job.run.is_baseline else self.queue

    def _groups(self) -> list[Group]:
        return [*self.replicas, *([self.comparer] if self.comparer else [])]

    def _at_work(self) -> list[Job]:
        return [job for replica in self.replicas for job in replica.at_work()]

    def _wake(self) -> None:
        for group in self._groups():
            group.wake()
