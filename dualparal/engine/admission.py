"""How a job is taken: after the operator's consent, with room in the queue and for its owner and on the disk, and then queued.

Whether a request fits the model and its devices is asked before, by the engine. What is recovered after a restart was taken
once and is not asked again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from dualparal.engine.dispatcher import Dispatcher
from dualparal.errors import RequestError
from dualparal.events import Queued
from dualparal.jobs.claim import claim
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import fold
from dualparal.jobs.job import Job
from dualparal.jobs.recovery import finished_blocks
from dualparal.jobs.storage import Storage
from dualparal.messages import RunJob
from dualparal.request import Settings

Admit = Callable[[Settings], str | None]


class Admission:
    """Stands before the dispatcher's queues."""

    def __init__(self, dispatcher: Dispatcher, storage: Storage, admit: Admit | None) -> None:
        """`admit` may refuse settings with a sentence."""
        self._dispatcher, self._storage, self._admit = dispatcher, storage, admit
        self._lock = threading.Lock()

    def check(self, request: Settings) -> None:
        """Raise `RequestError` when the operator does not want this request."""
        if self._admit is not None and (refused := self._admit(request)) is not None:
            raise RequestError(refused)

    @contextlib.contextmanager
    def taking(self, request: Settings, owner: str, job_id: str) -> Iterator[None]:
        """Make sure of room for one more job of `owner`; it is to be queued inside. One at a time: what was found to be free
        is not given away twice. Raises `QueueFull`, `OutputError`."""
        with self._lock:
            self._dispatcher.check_room(owner)
            open_jobs = {job.id: job.request for job in self._dispatcher.jobs()}
            keep = (request.continue_from,) if request.continue_from else ()
            self._storage.make_room(request, open_jobs, job_id=job_id, owner=owner, keep=keep)
            yield

    def queue(self, run: RunJob, folder: JobFolder, owner: str) -> Job:
        """Put the job of `folder` in the queue, claimed. Raises as `Dispatcher.check_open`."""
        dispatcher = self._dispatcher
        job = Job(
            run, folder, owner, dispatcher.cancel, on_end=dispatcher.job_ended, claim=claim(folder), steer=dispatcher.steer
        )
        if run.is_resumed:
            job.take_up(fold(folder.events()), finished_blocks(folder))
        try:
            job.emit(
                Queued(job_id=job.id, position=dispatcher.next_position(), owner=job.owner)
            )  # the disk is slow: before the lock
            dispatcher.add(job)
        except BaseException:
            job.release()
            raise
        return job
