"""The desk between those who submit jobs and the replicas that run them: who waits, who is at work, who goes next.

Every job that has not ended is in exactly one place: in the queue, or held by one replica. Thread-safe; `changed` is the lock.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from dualparal.errors import DualParalError, OutOfMemory, OutputError
from dualparal.events import Cancelled, Queued
from dualparal.runtime.ending import end_early, join_finished
from dualparal.runtime.job import Job
from dualparal.runtime.job_queue import JobQueue
from dualparal.runtime.locks import SafeCondition
from dualparal.runtime.metrics import Tally

log = logging.getLogger(__name__)
KEEP_ENDED = 32  # ended jobs kept in memory; all are on disk
MAX_INTERRUPTIONS = 1  # how often a job goes on by itself


class Group(Protocol):
    """What the desk asks of a replica."""

    state: str
    at_rank_0: Job | None

    def holds(self, job_id: str) -> bool: ...
    def at_work(self) -> list[Job]: ...
    def stop_job(self, job: Job) -> None: ...
    def wake(self) -> None: ...


class Dispatcher:
    """Hands queued jobs to replicas, one at a time each."""

    def __init__(self, queue: JobQueue[Job], *, auto_resume: bool, check: Callable[[Job], None] = lambda _: None) -> None:
        """`check` is called before a job is handed out: it waits on, and all behind it, while that raises `OutputError` (a full
        disk)."""
        self.changed = SafeCondition()
        self.queue = queue
        self.replicas: Sequence[Group] = ()
        self.tally = Tally()
        self.is_closing = False
        self._auto_resume, self._check = auto_resume, check
        self._jobs: dict[str, Job] = {}
        self._ended: deque[str] = deque()
        self._short: tuple[str, str] = ("", "")  # the job that waits for room on the disk, and in whose words
        self._owed: list[Job] = []  # ended, and a full disk has not taken all their events

    # For those who submit

    def add(self, job: Job) -> None:
        """Put a job in the queue."""
        with self.changed:
            self._jobs[job.id] = job
            self.queue.push(job, job.owner)
            self.tally.submitted()
            self._tell_positions(is_new=job)
        self._wake()

    def note(self, job: Job) -> None:
        """Know and count a job that waits and runs elsewhere (a comparison)."""
        with self.changed:
            self._jobs[job.id] = job
            self.tally.submitted()

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def jobs(self) -> list[Job]:
        """Jobs that have not ended: those at work first, then the queue in the order they will run."""
        with self.changed:
            at_work = [job for replica in self.replicas for job in replica.at_work()]
            return [job for job in (*at_work, *self.queue) if not job.has_ended]

    def num_running(self, owner: str) -> int:
        """Jobs of `owner` that are at work."""
        with self.changed:
            return sum(job.owner == owner and not job.has_ended for replica in self.replicas for job in replica.at_work())

    def cancel(self, job: Job) -> None:
        """Stop a job: a waiting one ends here, a running one at the next block step."""
        with self.changed:
            is_waiting = self.queue.remove(job)
            if is_waiting:
                self._tell_positions()
            else:
                job.is_stopping = True
                with contextlib.suppress(OSError):  # a full disk: the wish is known here all the same
                    job.folder.stop_wish.touch()
                for replica in self.replicas:
                    if replica.at_rank_0 is job:
                        replica.stop_job(job)
        if is_waiting:
            path, num_frames = join_finished(job)
            job.emit(Cancelled(job_id=job.id, path=path, num_frames=num_frames))

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
                self.queue.push_first(job)
                self._tell_short(job, str(error))
                return None
            self._short = ("", "")
            replica.at_rank_0 = job
            self._tell_positions()
            return job

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

    def note_failure(self, error: DualParalError) -> None:
        """A replica has failed for good; when it was the last one, nobody is left to run what waits."""
        with self.changed:
            is_last = all(replica.state == "failed" for replica in self.replicas)
        if is_last:
            self.end_all(error, is_stored=True)

    def end_all(self, error: DualParalError, *, is_stored: bool) -> None:
        """Fail every job that waits."""
        with self.changed:
            waiting = list(self.queue)
            self.queue.clear()
        for job in waiting:
            if is_stored:
                end_early(job, error)
            else:
                job.fail(error, is_stored=False)

    def note_end(self, job: Job) -> None:
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
        busy = sum(replica.at_rank_0 is not None for replica in self.replicas)
        ahead = max(0, busy - (len(self.replicas) - 1))
        for place, job in enumerate(self.queue):
            reason = self._short[1] if job.id == self._short[0] else ""
            job.emit(Queued(job_id=job.id, position=place + ahead, reason=reason), is_stored=job is is_new)

    def _wake(self) -> None:
        for replica in self.replicas:
            replica.wake()
