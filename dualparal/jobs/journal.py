"""A job's events on their way to its folder: what a full disk does not take waits, in order, and must not take the job down."""

from __future__ import annotations

import logging

from dualparal.events import Event, Finished
from dualparal.jobs.folder import JobFolder

log = logging.getLogger(__name__)


class Journal:
    """Not thread-safe: the job's lock guards it."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._owed: list[Event] = []
        self._has_warned = False  # of the disk

    @property
    def is_owing(self) -> bool:
        """Whether the disk has not taken everything yet."""
        return bool(self._owed)

    def add(self, event: Event) -> None:
        """Take an event that `store` is to append."""
        self._owed.append(event)

    def store(self) -> bool:
        """Append what is owed; False when something is still left."""
        while self._owed:
            try:
                self._folder.append(self._owed[0])
            except OSError as error:
                if not self._folder.path.is_dir():  # deleted meanwhile
                    self._owed.clear()
                    break
                name, job_id = type(self._owed[0]).__name__, self._folder.job_id
                level = logging.DEBUG if self._has_warned else logging.ERROR
                log.log(level, "job %s: event %s could not be stored yet: %s", job_id, name, error, extra={"job_id": job_id})
                self._has_warned = True
                return False
            if isinstance(self._owed.pop(0), Finished):
                self._folder.drop_state()  # not before the journal says so: a kill in between must leave one of the two
        return True
