"""A job stopped by another program than the one that runs it: through a file in its folder, which that one looks for.

Where nobody runs the job any more, it is ended here.
"""

from __future__ import annotations

import contextlib
import time

from dualparal.errors import OutputError, RequestError
from dualparal.events import Event
from dualparal.jobs.claim import claim, is_claimed
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.recovery import end_stopped

LOOK_EVERY_S = 0.1


def stop(folder: JobFolder, *, wait_s: float) -> Event | None:
    """Stop a job, whoever runs it; returns the event that ended it, which may be an older one, or None where it has not ended
    within `wait_s`: it will, at its next block step. Raises `RequestError`, `OutputError`."""
    deadline_s = time.monotonic() + wait_s
    if (final := folder.final_event()) is not None:
        return final
    try:
        folder.stop_wish.touch()
    except OSError as error:
        raise OutputError(f"job {folder.job_id} cannot be asked to stop: {error.strerror}") from None
    while (final := folder.final_event()) is None and time.monotonic() < deadline_s:
        if is_claimed(folder):
            time.sleep(LOOK_EVERY_S)
        else:
            _end(folder)
    if final is not None:
        with contextlib.suppress(OSError):
            folder.stop_wish.unlink(missing_ok=True)  # it had ended before it was asked
    return final


def _end(folder: JobFolder) -> None:
    try:
        held = claim(folder)
    except RequestError:  # somebody goes on with it at this moment, and is asked instead
        if is_claimed(folder):
            return
        raise
    try:
        if folder.final_event() is None:
            end_stopped(folder)
    finally:
        held.release()
