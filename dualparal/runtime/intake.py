"""What is asked before a job is taken: the operator's consent, room in the queue and for its owner, room on the disk.

Whether a request fits the model and its devices is asked before, by the engine. What is recovered after a restart was taken
once and is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dualparal.errors import RequestError
from dualparal.request import GenerationRequest
from dualparal.runtime.dispatcher import Dispatcher
from dualparal.runtime.job import Job
from dualparal.runtime.storage import Storage

Admit = Callable[[GenerationRequest], str | None]


class Intake:
    """Stands before the dispatcher's queue."""

    def __init__(self, desk: Dispatcher, storage: Storage, admit: Admit | None, open_jobs: Callable[[], Sequence[Job]]) -> None:
        """`admit` may refuse a resolved request with a sentence; `open_jobs` gives all jobs that have not ended."""
        self._desk, self._storage, self._admit, self._open_jobs = desk, storage, admit, open_jobs

    def check(self, request: GenerationRequest) -> None:
        """Raise `RequestError` when the operator does not want this request."""
        if self._admit is not None and (refused := self._admit(request)) is not None:
            raise RequestError(refused)

    def check_room(self, owner: str) -> None:
        """Raise `QueueFull` unless `owner` may add a job."""
        self._desk.queue.check_room(owner, self._desk.num_running(owner))

    def make_room(self, request: GenerationRequest) -> None:
        """Make room on the disk, or raise `OutputError`."""
        self._storage.make_room(request, {job.id: job.request for job in self._open_jobs()})
