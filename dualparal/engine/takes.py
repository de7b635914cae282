"""Takes of a request: queued together or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualparal.errors import DualParalError, RequestError
from dualparal.jobs.folder import new_job_id
from dualparal.jobs.job import Job
from dualparal.jobs.takes import takes_of
from dualparal.request import MAX_TAKES, GenerationRequest, Settings

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine


def submit_takes(engine: Engine, request: GenerationRequest | Settings, takes: int, owner: str) -> list[Job]:
    """See `Engine.submit_takes`."""
    if not 2 <= takes <= MAX_TAKES:
        raise RequestError(f"takes={takes} is not between 2 and {MAX_TAKES}", "takes")
    jobs: list[Job] = []
    ids = [new_job_id() for _ in range(takes)]
    try:
        for take, settings in takes_of(engine.resolve(request), ids):
            jobs.append(engine.submit(settings, owner=owner, job_id=ids[take.number], take=take))
    except DualParalError:
        for job in jobs:
            job.cancel()
        raise
    return jobs


def check_one(request: GenerationRequest | Settings) -> None:
    """Raise `RequestError` where a request of several takes is submitted as one video."""
    if (takes := getattr(request, "takes", None) or 1) > 1:
        raise RequestError(f"takes={takes} are several videos; use submit_takes, /submit or generate --takes", "takes")
