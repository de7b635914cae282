"""What is asked before a job is taken: the operator's consent, room in the queue and for its owner, room on the disk.

Whether a request fits the model and its devices is asked before, by the engine. What is recovered after a restart was taken
once and is not asked again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from dualparal.errors import RequestError
from dualparal.request import GenerationRequest
from dualparal.runtime.baseline_lane import BaselineLane
from dualparal.runtime.dispatcher import Dispatcher
from dualparal.runtime.storage import Storage

Admit = Callable[[GenerationRequest], str | None]


class Intake:
    """Stands before the dispatcher's queue and the line of comparisons, which share their limits."""

    def __init__(self, desk: Dispatcher, baselines: BaselineLane, storage: Storage, admit: Admit | None) -> None:
        """`admit` may refuse a resolved request with a sentence."""
        self._desk, self._baselines, self._storage, self._admit = desk, baselines, storage, admit
        self._lock = threading.Lock()

    def check(self, request: GenerationRequest) -> None:
        """Raise `RequestError` when the operator does not want this request."""
        if self._admit is not None and (refused := self._admit(request)) is not None:
            raise RequestError(refused)

    @contextlib.contextmanager
    def taking(self, request: GenerationRequest, owner: str, job_id: str) -> Iterator[None]:
        """Make sure of room for one more job of `owner`; it is to be queued inside. One at a time: what was found to be free
        is not given away twice. Raises `QueueFull`, `OutputError`."""
        with self._lock:
            comparisons = self._baselines.jobs()
            self._desk.queue.check_room(
                owner,
                self._desk.num_running(owner) + sum(job.owner == owner for job in comparisons),
                num_elsewhere=sum(job.state == "queued" for job in comparisons),
            )
            open_jobs = {job.id: job.request for job in (*self._desk.jobs(), *comparisons)}
            self._storage.make_room(request, open_jobs, job_id=job_id)
            yield
