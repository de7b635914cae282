"""From a request to the rules of its schedule. What depends on the number of ranks is settled once, when a job is submitted.

A policy is the name of a few numbers; this is the one place that knows names. A new one is an entry in `POLICIES`, its name in
`request.SCHEDULES`, a test and a line in the docs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dualparal.errors import RequestError
from dualparal.method.event_model import choose_preview
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules
from dualparal.method.step_cache import StepCache
from dualparal.method.timeline import scenes_of
from dualparal.request import (
    AUTO,
    AskedContext,
    AskedSchedule,
    ContextName,
    GenerationRequest,
    LeftContext,
    ScheduleName,
    Settings,
)


def plan_of(request: Settings) -> BlockPlan:
    """The block plan of a video. A film of one shot is cut as one without. As long as nobody has looked at the film that is
    continued, it is taken to be long enough."""
    shots, sizes = request.shots or (), (request.num_per_block, request.num_cat)
    before = 0 if request.continue_from is None else request.ghost or request.num_cat
    picture = request.start_image is not None
    if len(shots) <= 1:
        return BlockPlan.of(request.latents_num, *sizes, picture=picture, before=before)
    return BlockPlan.of_scenes(scenes_of(shots), *sizes, picture=picture, before=before)


Numbers = dict[str, int | bool]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the name of a schedule stands for: which latents are left context, and `numbers(settings, asked, ranks, rings)`, the
    `max_in_flight`, `stagger` and `micro_batches` of a video on an engine of `rings` rings of `ranks` ranks; `asked` has those
    set by hand."""

    left_context: LeftContext
    numbers: Callable[[Settings, GenerationRequest, int, int], Numbers]


def _paper(settings: Settings, asked: GenerationRequest, ranks: int, rings: int) -> Numbers:
    """All blocks at once, a step apart: more than there are steps are never in flight then. The request's own numbers and the
    ranks have no say."""
    return {"max_in_flight": settings.num_inference_steps, "stagger": 1, "micro_batches": bool(asked.micro_batches)}


def _preview(settings: Settings, asked: GenerationRequest, ranks: int, rings: int) -> Numbers:
    """A few blocks at a time, evenly staggered. Own numbers stay; the event model chooses the rest."""
    num_steps, has_guidance = settings.num_inference_steps, settings.has_guidance
    chosen = choose_preview(
        plan_of(settings), (0,) * num_steps, ranks, rings=rings, context=settings.context, has_guidance=has_guidance
    )
    own = asked.max_in_flight
    stagger = asked.stagger or (_spread(num_steps, own) if own else chosen.stagger)
    return {
        "max_in_flight": own or _spread(num_steps, stagger),
        "stagger": stagger,
        "micro_batches": has_guidance and (chosen.micro_batches if asked.micro_batches is None else asked.micro_batches),
    }


def _spread(num_steps: int, count: int) -> int:
    """Steps between neighbours when `count` blocks share all steps; and blocks in flight when they are `count` steps apart."""
    return max(1, -(-num_steps // count))


MAX_REFRESH_WORK = 0.035  # of the window frames; with what saving takes, less than 4 % of the work

POLICIES: dict[str, Policy] = {
    "paper": Policy(left_context="latest", numbers=_paper),
    "preview": Policy(left_context="own_step", numbers=_preview),
}


def settle_names(
    asked: GenerationRequest, schedule: AskedSchedule, context: AskedContext, *, has_room: bool
) -> tuple[ScheduleName, ContextName]:
    """Schedule and context of a video, from what is `asked` for and else a preset's; chosen together where they are left open.

    `preview` with cached context where there is room for its K and V, else `paper` with recomputed context, as the authors
    have it. `preview` with recomputed context costs quality: nobody gets it who has not asked for both.
    """
    schedule, context = asked.schedule or schedule, asked.context or context
    if (schedule, context) == ("preview", "recomputed") and (asked.schedule is None) != (asked.context is None):
        schedule, context = (schedule, AUTO) if asked.context is None else (AUTO, context)
    if context == AUTO:
        context = "cached" if schedule == "preview" or (schedule == AUTO and has_room) else "recomputed"
    if schedule == AUTO:
        schedule = "preview" if context == "cached" else "paper"
    return schedule, context


def as_in_the_paper(settings: Settings, rings: int = 1) -> Settings:
    """`settings` in the authors' order with recomputed context: no left neighbour's K and V are kept."""
    asked = GenerationRequest(prompt="any", refresh=settings.refresh)
    paper = settings.model_copy(update={"schedule": "paper", "context": "recomputed"})
    return settle_rules(paper, asked, ranks=1, rings=rings)


def depends_on_room(asked: GenerationRequest, schedule: AskedSchedule, context: AskedContext) -> bool:
    """Whether `settle_names` has to be told what fits."""
    return (asked.schedule or schedule, asked.context or context) == (AUTO, AUTO)


def check_halves(settings: Settings, rings: int) -> None:
    """Raise `RequestError` for a video whose guidance halves are done in one batch, where each has a ring of its own: its bits
    would be others."""
    if rings > 1 and settings.has_guidance and not settings.micro_batches:
        raise RequestError(
            "micro_batches is off, and guidance_parallel=2 runs the guidance halves by themselves; leave micro_batches out, or "
            "use guidance_parallel=1",
            "micro_batches",
        )


def settle_rules(settings: Settings, asked: GenerationRequest, ranks: int, rings: int = 1) -> Settings:
    """`settings` with `refresh` and the numbers of their policy for an engine of `rings` rings of `ranks` ranks; `asked` has
    those set by hand. Raises `RequestError` as `check_halves` does."""
    policy = POLICIES[settings.schedule]
    refresh = default_refresh(plan_of(settings)) if asked.refresh is None else asked.refresh
    numbers = policy.numbers(settings, asked, ranks, rings)
    if rings > 1 and asked.micro_batches is None:  # each half travels a ring of its own
        numbers["micro_batches"] = settings.has_guidance
    settled = settings.model_copy(update={"left_context": policy.left_context, "refresh": refresh, **numbers})
    check_halves(settled, rings)
    return settled


def default_refresh(plan: BlockPlan) -> int:
    """After how many passes cached left context is recomputed, so that it adds less than `MAX_REFRESH_WORK`: passes see their
    block's frames, those that recompute the left context's too."""
    more = sum(plan.num_left(block) for block in range(plan.num_blocks)) / plan.latents_num
    return int(more / MAX_REFRESH_WORK) + 1


def rules_of(request: Settings) -> Rules:
    """The rules of a video's schedule."""
    return Rules(
        max_in_flight=request.max_in_flight,
        stagger=request.stagger,
        left_context=request.left_context,
        context=request.context,
        micro_batches=request.micro_batches and request.has_guidance,
        guided_steps=guided_steps(request) if max(request.guidance_scale, request.guidance_scale_2) > 1 else None,
        step_cache=step_cache(request),
        refresh=request.refresh,
    )


def guided_steps(request: Settings) -> tuple[int, int] | None:
    """First and end of the steps with guidance, as diffusers' guiders count them; None when it is all of them."""
    num_steps = request.num_inference_steps
    start, stop = int(request.guidance_start * num_steps), int(request.guidance_stop * num_steps)
    return None if (start, stop) == (0, num_steps) else (start, stop)


def step_cache(request: Settings) -> StepCache | None:
    """Which steps are skipped; None when all are computed."""
    if request.cache_interval == 1:
        return None
    return StepCache(
        interval=request.cache_interval,
        max_order=request.cache_order,
        before=request.disable_cache_before_step,
        after=request.disable_cache_after_step,
    )
