"""Who works on a job: a lock on its `request.json`, held by the front end that runs it and gone with that process.

So two programs on one outputs folder never run the same job, and anybody can tell a job that runs from one that was cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dualparal.errors import RequestError
from dualparal.jobs.folder import JobFolder
from dualparal.request import Settings

log = logging.getLogger(__name__)
NUM_TRIES = 5  # somebody who only looks holds the lock for a moment
PAUSE_S = 0.02
LEFTOVERS_S = 1.0  # a child that was forked by a program now dead reaches its exec within that


class Claim:
    """The right to work on a job, until `release` or the end of this process."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; may be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _unlock(descriptor)


_made_here: dict[Path, Claim] = {}  # jobs of `create_job` that nobody has claimed yet


def create_job(outputs: Path, job_id: str, request: Settings, **about: Any) -> JobFolder:
    """`JobFolder.create` for a job that this process will `claim`: no other program can take it before, not even one that
    starts at this moment."""
    held: list[int] = []

    def hold(partial: Path) -> None:
        held.append(os.open(partial, os.O_RDONLY | os.O_CLOEXEC))
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    try:
        folder = JobFolder.create(outputs, job_id, request, before_naming=hold, **about)
    except BaseException:
        for descriptor in held:
            os.close(descriptor)
        raise
    _made_here[folder.path] = Claim(held[0])
    return folder


def claim(folder: JobFolder) -> Claim:
    """Take the job; raises `RequestError` when another program (or engine) works on it."""
    if (mine := _made_here.pop(folder.path, None)) is not None:
        return mine
    for left in reversed(range(NUM_TRIES)):
        descriptor = _open(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Claim(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if left:
                time.sleep(PAUSE_S)
        except OSError as error:  # a file system without locks: go on without
            os.close(descriptor)
            log.info("job %s is not locked: %s", folder.job_id, error)
            return Claim(None)
    raise RequestError(f"job {folder.job_id} is being worked on; wait for it or stop it first", "job_id")


def is_claimed(folder: JobFolder, *, num_tries: int = NUM_TRIES) -> bool:
    """Whether somebody works on the job or has it in a queue now. One try is enough where a mistake lasts for a moment only."""
    try:
        descriptor = _open(folder)
    except RequestError:
        return False
    try:
        for left in reversed(range(num_tries)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except BlockingIOError:  # or a child of a program that has died, between its fork and its exec
                if left:
                    time.sleep(PAUSE_S)
            except OSError:
                return False
        return True
    finally:
        _unlock(descriptor)


def wait_for_leftovers(folders: Iterable[JobFolder]) -> None:
    """Give children of programs that have just died the time to let go of these jobs' locks; what is still held then has
    somebody who works on it."""
    held, deadline_s = list(folders), time.monotonic() + LEFTOVERS_S
    while (held := [folder for folder in held if is_claimed(folder, num_tries=1)]) and time.monotonic() < deadline_s:
        time.sleep(PAUSE_S)


def delete_job(folder: JobFolder) -> None:
    """Remove an ended job that nobody works on. Raises `RequestError` when somebody does, `OutputError`."""
    held = claim(folder)
    try:
        folder.delete()
    finally:
        held.release()


def _unlock(descriptor: int) -> None:
    """Unlock, then close: a child between fork and exec has a copy of the descriptor and would keep the lock."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _open(folder: JobFolder) -> int:
    """The record, or the folder itself where that is lost."""
    try:
        with contextlib.suppress(OSError):
            return os.open(folder.path / "request.json", os.O_RDONLY | os.O_CLOEXEC)
        return os.open(folder.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RequestError(f"job {folder.job_id} has no readable request.json: {error.strerror}", "job_id") from None
