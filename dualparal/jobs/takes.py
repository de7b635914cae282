"""Takes: one request with several seeds. Each runs to a first look, then rests as a saved sweep, and goes on when it is chosen.

A take is a job of its own; its record says which others it belongs with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dualparal.events import Cancelled, Event
from dualparal.messages import Take
from dualparal.request import MAX_SEED, Settings

FIRST_LOOK = 0.4  # of the first block's steps: it is recognisable by then, and the next blocks have begun


def takes_of(settings: Settings, job_ids: list[str]) -> list[tuple[Take, Settings]]:
    """`settings` with as many seeds as there are `job_ids`, one after another from its own on."""
    rest_at = min(settings.num_inference_steps, max(1, math.ceil(FIRST_LOOK * settings.num_inference_steps)))
    return [
        (
            Take(group=job_ids[0], number=number, num_takes=len(job_ids), rest_at=rest_at),
            settings.model_copy(update={"seed": (settings.seed + number) % (MAX_SEED + 1)}),
        )
        for number in range(len(job_ids))
    ]


def from_record(record: dict[str, Any]) -> Take | None:
    """The take that a job's record tells of; None where it is no take."""
    found = record.get("take")
    try:
        take = Take(**found) if isinstance(found, dict) else None
    except TypeError:
        return None
    if (
        take is None
        or not isinstance(take.group, str)
        or {type(take.number), type(take.num_takes), type(take.rest_at)} != {int}
    ):
        return None
    return take


def has_rested(events: Iterable[Event]) -> bool:
    """Whether a take has come to its first look before."""
    return any(isinstance(event, Cancelled) and event.is_resting for event in events)
