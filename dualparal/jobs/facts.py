"""What is known of every job, read from its folder: for the page's gallery, `python -m dualparal jobs`, and scripts.

The folders are the registry: there is no index to fall out of step with them. Reading one job is two small files, so lists
are read lazily and in pages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dualparal.errors import DualParalError
from dualparal.events import Event, Failed, Finished
from dualparal.jobs.claim import is_claimed
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.jobs.history import STATES, History, fold


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """One job. `state` is one of `STATES`: interrupted jobs were cut off and can be resumed. `num_frames` are finished,
    `num_frames_asked` promised; `age_s` since it was made; `worked_s` of them under way; `error` one sentence."""

    job_id: str
    state: str
    owner: str
    model: str
    prompt: str
    created_s: float
    num_frames: int
    num_frames_asked: int | None
    num_interruptions: int
    worked_s: float
    error: str | None
    timings: dict[str, float] = field(default_factory=dict)
    final: Event | None = None

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.created_s)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of plain values."""
        return {name: value for name, value in vars(self).items() if name != "final"}


def read_history(folder: JobFolder) -> tuple[History, str]:
    """A job's history and its state. Raises `OutputError` where its journal is there and cannot be read."""
    history = fold(folder.events())
    if history.final is None and not (is_held := is_claimed(folder, num_tries=1)):
        history = fold(folder.events())  # it may have ended between the two looks
    else:
        is_held = history.final is None
    return history, history.state_of(is_held=is_held)


def read_facts(folder: JobFolder) -> JobFacts:
    """The facts of one job. Raises `OutputError` when its `request.json` is damaged."""
    record = folder.record()
    request = record.get("request")
    request = request if isinstance(request, dict) else {}
    history, state = read_history(folder)
    final = history.final
    return JobFacts(
        job_id=folder.job_id, state=state, owner=str(record.get("owner") or ""), model=str(record.get("model") or ""),
        prompt=_all_text(request), created_s=created_s(record), num_frames=history.num_frames,
        num_frames_asked=history.started.num_frames if history.started else None, num_interruptions=history.num_interruptions,
        worked_s=history.worked_s, error=final.message if isinstance(final, Failed) else None,
        timings=final.timings if isinstance(final, Finished) else {}, final=final,
    )  # fmt: skip


def _all_text(request: dict[str, Any]) -> str:
    """`Settings.all_text` of a record that any version may have written."""
    shots = request.get("shots")
    shots = [shot for shot in shots if isinstance(shot, dict)] if isinstance(shots, list) else []
    return " · ".join(str(found.get("prompt")) for found in (request, *shots) if found.get("prompt"))


def all_facts(outputs: Path, *, owner: str | None = None, states: Collection[str] = STATES) -> Iterator[JobFacts]:
    """Every job of `owner` (None: of anybody) in one of `states`, newest first, read as it is asked for. Folders that cannot
    be read are left out."""
    for folder in list_jobs(outputs):
        try:
            facts = read_facts(folder)
        except DualParalError:
            continue
        if (owner is None or facts.owner == owner) and facts.state in states:
            yield facts


def list_facts(
    outputs: Path, *, owner: str | None = None, states: Collection[str] = STATES, skip: int = 0, limit: int = 50
) -> list[JobFacts]:
    """One page of `all_facts`: `limit` jobs after the first `skip`."""
    return list(islice(all_facts(outputs, owner=owner, states=states), skip, skip + limit))


def created_s(record: dict[str, Any]) -> float:
    """When a job's record says that it was made, seconds since the epoch; 0 where it does not."""
    value = record.get("created_s")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
