"""One slider between the smoothest video and the soonest first frames: what each of its places asks of the schedule.

The left end is `paper`: every block is denoised together with its neighbours, and the first one is ready late. The right end is
`preview` with as few blocks in flight as keep all stages busy, which the event model knows; between them lie twice and four
times as many.
"""

from __future__ import annotations

import math
from typing import Any

from dualparal.core.rules import plan_of
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.ui.studio import Studio

SMOOTHEST, SOONEST = 0, 3
CACHE = ("cache_interval", "cache_order", "disable_cache_before_step", "disable_cache_after_step")
RULES = ("max_in_flight", "stagger", "micro_batches")
SCHEDULE = ("schedule", *RULES)
UNSEEN = (*SCHEDULE, "fps", "guidance_start", "guidance_stop", *CACHE)
LABEL = "Smoothest to soonest"
INFO = "Left: all blocks are denoised together. Right: only a few at a time, so the first one plays much sooner."


def of_preset(preset: Preset) -> int:
    """The place of a preset's own schedule."""
    return SMOOTHEST if preset.schedule == "paper" else SOONEST


def fields(studio: Studio, request: GenerationRequest, preset_name: object, place: int) -> dict[str, Any]:
    """What the slider at `place` sets in `request`. Raises `RequestError` when the rest of the request is not usable."""
    if place == SMOOTHEST:
        return {"schedule": "paper"}
    if place == SOONEST:
        return {"schedule": "preview"}
    resolved = studio.resolve(request.model_copy(update={"schedule": "preview"}), preset_name)
    assert resolved.max_in_flight
    return {"schedule": "preview", "max_in_flight": min(_most(resolved), resolved.max_in_flight << (SOONEST - place))}


def of_request(studio: Studio, resolved: GenerationRequest, preset_name: object) -> int:
    """The place nearest to what a resolved request asks for."""
    if resolved.schedule == "paper" or not resolved.max_in_flight:
        return SMOOTHEST if resolved.schedule == "paper" else SOONEST
    soonest = studio.resolve(resolved.model_copy(update=dict.fromkeys(RULES)), preset_name)
    assert soonest.max_in_flight
    doublings = round(math.log2(max(1.0, resolved.max_in_flight / soonest.max_in_flight)))
    return max(SMOOTHEST + 1, SOONEST - doublings)


def exact(resolved: GenerationRequest) -> dict[str, Any]:
    """What a stored request says that the form shows inexactly or not at all, so that using it again makes the same bits."""
    found = {name: getattr(resolved, name) for name in UNSEEN}
    if resolved.negative_prompt == "":  # an empty box means the preset's
        found["negative_prompt"] = ""
    return found


def moved(exactly: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is left of `exact` when the slider has been moved: all but the schedule."""
    return {name: value for name, value in (exactly or {}).items() if name not in SCHEDULE} or None


def _most(resolved: GenerationRequest) -> int:
    assert resolved.num_inference_steps
    return max(1, min(plan_of(resolved).num_blocks, resolved.num_inference_steps))
