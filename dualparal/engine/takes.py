"""Takes of a request: queued together or not at all."""

from __future__ import annotations

from collections.abc import Callable

from dualparal.errors import DualParalError, RequestError
from dualparal.jobs.folder import new_job_id
from dualparal.jobs.job import Job
from dualparal.jobs.takes import takes_of
from dualparal.messages import Take
from dualparal.request import MAX_TAKES, GenerationRequest, Settings

Submit = Callable[[Settings, str, Take], Job]


def submit_takes(settings: Settings, takes: int, submit: Submit) -> list[Job]:
    """See `Engine.submit_takes`; `submit` queues one take under a job id."""
    if not 2 <= takes <= MAX_TAKES:
        raise RequestError(f"takes={takes} is not between 2 and {MAX_TAKES}", "takes")
    if settings.is_endless:
        raise RequestError("an endless film has no takes; give it a length, or leave takes out", "takes")
    jobs: list[Job] = []
    ids = [new_job_id() for _ in range(takes)]
    try:
        for take, one in takes_of(settings, ids):
            jobs.append(submit(one, ids[take.number], take))
    except DualParalError:
        for job in jobs:
            job.cancel()
        raise
    return jobs


def check_one(request: GenerationRequest | Settings) -> None:
    """Raise `RequestError` where a request of several takes is submitted as one video."""
    if (takes := getattr(request, "takes", None) or 1) > 1:
        raise RequestError(f"takes={takes} are several videos; use submit_takes, /submit or generate --takes", "takes")
