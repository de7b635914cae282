"""Schedule and context of a request that leaves them open, for given devices: `preview` with cached context where the plan says
that its K and V fit, else `paper` with recomputed context (`method.rules.settle_names`); never `preview` recomputed.

Decided once, when a job is submitted, and stored with the reason. Pure arithmetic on `job_plan`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dualparal.method.rules import depends_on_room
from dualparal.planning.job_plan import JobPlan, moved, plan_job
from dualparal.planning.memory_table import gigabytes
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest, Settings

HIDDEN = 1.02  # copies that make a video take no more than so many times as long are hidden behind the work


def settle(
    request: GenerationRequest, preset: Preset, sizes: ModelSizes, placement: Placement, *, speed: Speed | None = None,
    host_bytes: int | None = None, **checkpoint: Any,
) -> Settings:  # fmt: skip
    """`complete` for these devices; `checkpoint` is what it takes besides. `speed` says whether copies of `--offload_cache`
    are hidden, `host_bytes` whether their host has room (None: not known, taken to be so). Raises `RequestError`."""
    values = {"ranks": len(placement.layers), "rings": placement.guidance, "num_experts": sizes.num_experts, **checkpoint}
    roomy = complete(request, preset, has_room=True, **values)
    sizes.check_size(roomy)
    if not depends_on_room(request, preset.schedule, preset.context):
        return roomy
    plan = plan_job(roomy, sizes, placement, is_short=True)
    problem = _shortage(plan, speed, host_bytes)
    if problem is None:
        return roomy.model_copy(update={"chosen": f"preview with cached context: {_kv(plan)} fit"})
    if plan.refusal is not None and _would_fit(plan, sizes):
        problem += "; with --offload_cache they would"
    tight = complete(request.model_copy(update={"seed": roomy.seed}), preset, **values)
    return tight.model_copy(update={"chosen": f"paper with recomputed context: {problem}"})


def _kv(plan: JobPlan) -> str:
    """Whose K and V, how many and where."""
    whose = f"K and V of {plan.workload.schedule.num_in_flight()} blocks in flight"
    if plan.placement.is_cache_offloaded:
        return f"{whose} ({gigabytes(plan.memory.host_caches)} in host memory)"
    return f"{whose} ({gigabytes(max(rank.feature_cache for rank in plan.memory.ranks))} on a rank)"


def _shortage(plan: JobPlan, speed: Speed | None, host_bytes: int | None) -> str | None:
    """Why the K and V of `plan` are not to be kept; None where they fit."""
    if plan.placement.bytes_per_device is None:
        return "how much memory the devices have is not known"
    if plan.refusal is not None:
        return f"{_kv(plan)} do not fit"
    if not plan.placement.is_cache_offloaded:
        return None
    if host_bytes is not None and plan.memory.host_caches + plan.memory.host_layers > host_bytes:
        return f"{_kv(plan)} do not fit the host's {gigabytes(host_bytes)}"
    if speed is None or speed.link_bytes_per_s is None:  # taken to arrive in time, as everywhere
        return None
    at_hand, copied = (replace(plan, speed=by).forecast for by in (replace(speed, link_bytes_per_s=None), speed))
    assert at_hand is not None and copied is not None
    longer = copied.total / at_hand.total
    return None if longer <= HIDDEN else f"{_kv(plan)} would make it take {longer:.1f} times as long, by copies"


def _would_fit(plan: JobPlan, sizes: ModelSizes) -> bool:
    away = replace(plan.placement, is_cache_offloaded=True)
    return plan.placement.on_gpu and moved(plan, sizes, away).refusal is None
