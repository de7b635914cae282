"""One slider between the smoothest video and the soonest first frames: what each of its places asks of the schedule.

The left end is `paper`: every block is denoised together with its neighbours, and the first one is ready late. The right end is
`preview` with as few blocks in flight as keep all stages busy and seams faint (`method.rules`); between them lie twice and four
times as many. Where a preset starts, its own schedule decides, `auto` included.
"""

from __future__ import annotations

import math

from dualparal.errors import RequestError
from dualparal.method.event_model import even_stagger
from dualparal.method.grid import Grid
from dualparal.method.rules import settle_rules
from dualparal.presets import USUAL, Preset
from dualparal.request import ScheduleName, Settings

SMOOTHEST, SOONEST = 0, 3
NUMBERS = ("max_in_flight", "stagger", "micro_batches")  # of a request, which a policy chooses where they are left out
LABEL = "Smoothest to soonest"
INFO = "Left: all blocks are denoised together. Right: only a few at a time, so the first one plays much sooner."


def of_preset(preset: Preset) -> int:
    """The place of a preset's own schedule."""
    return SMOOTHEST if preset.schedule == "paper" else SOONEST


def schedule_at(place: object) -> ScheduleName:
    """The policy that a place of the slider asks for. Raises `RequestError`."""
    if place not in range(SMOOTHEST, SOONEST + 1):
        raise RequestError(f"smoothest to soonest is a whole number from {SMOOTHEST} to {SOONEST}", "schedule")
    return "paper" if place == SMOOTHEST else "preview"


def spread(settings: Settings, place: int) -> Settings:
    """`settings` with the policy's own numbers, with as many more blocks in flight as `place` is away from the right end."""
    if place in (SMOOTHEST, SOONEST):
        return settings
    num_steps = settings.num_inference_steps
    stagger = even_stagger(num_steps, settings.max_in_flight << (SOONEST - place))
    return settings.model_copy(update={"max_in_flight": -(-num_steps // stagger), "stagger": stagger})


def of_settings(settings: Settings, grid: Grid) -> int:
    """The place nearest to what `settings` ask of an engine whose ranks stand in `grid`."""
    if settings.schedule == "paper":
        return SMOOTHEST
    soonest = settle_rules(settings, USUAL, grid.stages, grid.guidance)
    doublings = round(math.log2(max(1.0, settings.max_in_flight / soonest.max_in_flight)))
    return max(SMOOTHEST + 1, SOONEST - doublings)
