"""What is known of every job, read from its folder: for the page's gallery, `python -m dualparal jobs`, and scripts.

The folders are the registry: there is no index to fall out of step with them. Reading one job is two small files, so lists
are read lazily and in pages.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dualparal.errors import DualParalError
from dualparal.events import FINAL, BlockReady, Event, Failed, Finished, Queued, Started
from dualparal.runtime.claim import is_claimed
from dualparal.runtime.journal import JobFolder, list_jobs

STATES = ("queued", "running", "finished", "failed", "cancelled", "interrupted")


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """One job. `state` is one of `STATES`: interrupted jobs were cut off and can be resumed. `num_frames` are finished,
    `num_frames_asked` promised; `age_s` since it was made; `error` one sentence."""

    job_id: str
    state: str
    owner: str
    model: str
    prompt: str
    created_s: float
    num_frames: int
    num_frames_asked: int | None
    num_interruptions: int
    error: str | None
    timings: dict[str, float] = field(default_factory=dict)
    final: Event | None = None

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.created_s)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of plain values."""
        return {name: value for name, value in vars(self).items() if name != "final"}


def read_facts(folder: JobFolder) -> JobFacts:
    """The facts of one job. Raises `OutputError` when its `request.json` is damaged."""
    record = folder.record()
    request = record.get("request")
    request = request if isinstance(request, dict) else {}
    events = folder.events()
    final = next((event for event in reversed(events) if isinstance(event, (*FINAL, Queued))), None)
    final = None if isinstance(final, Queued) else final
    started = next((event for event in reversed(events) if isinstance(event, (Started, Queued))), None)
    if final is not None:
        state = type(final).__name__.lower()
    elif is_claimed(folder):
        state = "running" if isinstance(started, Started) else "queued"
    else:
        state = "interrupted"
    asked = next((event.num_frames for event in reversed(events) if isinstance(event, Started)), None)
    return JobFacts(
        job_id=folder.job_id, state=state, owner=str(record.get("owner") or ""), model=str(record.get("model") or ""),
        prompt=str(request.get("prompt") or ""), created_s=_number(record.get("created_s")),
        num_frames=sum({e.block: e.num_frames for e in events if isinstance(e, BlockReady)}.values()),
        num_frames_asked=asked, num_interruptions=sum(type(event).__name__ == "Interrupted" for event in events),
        error=final.message if isinstance(final, Failed) else None,
        timings=final.timings if isinstance(final, Finished) else {}, final=final,
    )  # fmt: skip


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


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
