"""Who works on a job: a lock on its `request.json`, held by the front end that runs it and gone with that process.

So two programs on one outputs folder never run the same job, and anybody can tell a job that runs from one that was cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

from dualparal.errors import RequestError
from dualparal.request import GenerationRequest
from dualparal.runtime.journal import JobFolder

log = logging.getLogger(__name__)
NUM_TRIES = 5  # somebody who only looks holds the lock for a moment
PAUSE_S = 0.02


class Claim:
    """The right to work on a job, until `release` or the end of this process."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; may be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_made_here: dict[Path, Claim] = {}  # jobs of `create_job` that nobody has claimed yet


def create_job(outputs: Path, job_id: str, request: GenerationRequest, **about: Any) -> JobFolder:
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


def is_claimed(folder: JobFolder) -> bool:
    """Whether somebody works on the job or has it in a queue now."""
    try:
        descriptor = _open(folder)
    except RequestError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def delete_job(folder: JobFolder) -> None:
    """Remove an ended job that nobody works on. Raises `RequestError` when somebody does, `OutputError`."""
    held = claim(folder)
    try:
        folder.delete()
    finally:
        held.release()


def _open(folder: JobFolder) -> int:
    try:
        return os.open(folder.path / "request.json", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RequestError(f"job {folder.job_id} has no readable request.json: {error.strerror}", "job_id") from None
