"""From a request to the rules of its schedule. What depends on the number of ranks is settled once, when a job is submitted."""

from __future__ import annotations

from dualparal.core.event_model import choose_preview
from dualparal.core.plan import BlockPlan
from dualparal.core.schedule import Rules
from dualparal.core.step_cache import StepCache
from dualparal.request import GenerationRequest


def plan_of(request: GenerationRequest) -> BlockPlan:
    """The block plan of a resolved request."""
    assert request.latents_num and request.num_per_block and request.num_cat is not None
    return BlockPlan.of(request.latents_num, request.num_per_block, request.num_cat)


def settle_rules(request: GenerationRequest, ranks: int) -> GenerationRequest:
    """A resolved `request` with `max_in_flight`, `stagger` and `micro_batches` filled for an engine of `ranks` ranks.

    Own values stay; the event model chooses the rest. `paper` needs none of them and depends on nothing but the request.
    """
    if request.schedule == "paper":
        return request.model_copy(update={"max_in_flight": None, "stagger": None, "micro_batches": bool(request.micro_batches)})
    assert request.num_inference_steps and request.context and request.guidance_scale is not None
    has_guidance = request.guidance_scale > 1
    chosen = choose_preview(
        plan_of(request), (0,) * request.num_inference_steps, ranks, context=request.context, has_guidance=has_guidance
    )
    max_in_flight = request.max_in_flight or chosen.max_in_flight
    even = max(1, -(-request.num_inference_steps // max_in_flight))
    micro_batches = chosen.micro_batches if request.micro_batches is None else request.micro_batches
    return request.model_copy(
        update={
            "max_in_flight": max_in_flight,
            "stagger": request.stagger or even,
            "micro_batches": micro_batches and has_guidance,
        }
    )


def rules_of(request: GenerationRequest) -> Rules:
    """The rules of a request that `settle_rules` has filled."""
    assert request.schedule and request.context and request.guidance_scale is not None
    return Rules(
        policy=request.schedule,
        context=request.context,
        max_in_flight=request.max_in_flight or 1,
        stagger=request.stagger or 1,
        micro_batches=bool(request.micro_batches) and request.guidance_scale > 1,
        guided_steps=guided_steps(request) if max(request.guidance_scale, request.guidance_scale_2 or 0.0) > 1 else None,
        step_cache=step_cache(request),
    )


def guided_steps(request: GenerationRequest) -> tuple[int, int] | None:
    """First and end of the steps with guidance, as diffusers' guiders count them; None when it is all of them."""
    assert request.num_inference_steps
    num_steps = request.num_inference_steps
    start = int((request.guidance_start or 0.0) * num_steps)
    stop = num_steps if request.guidance_stop is None else int(request.guidance_stop * num_steps)
    return None if (start, stop) == (0, num_steps) else (start, stop)


def step_cache(request: GenerationRequest) -> StepCache | None:
    """Which steps of a resolved request are skipped; None when all are computed."""
    if not request.cache_interval or request.cache_interval == 1:
        return None
    assert request.cache_order is not None and request.disable_cache_before_step
    return StepCache(
        interval=request.cache_interval,
        max_order=request.cache_order,
        before=request.disable_cache_before_step,
        after=request.disable_cache_after_step,
    )
