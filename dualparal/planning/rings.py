"""The same ranks in two rings, or in one (METHOD.md, "Within a stage"): what a job would need and take so. Pure arithmetic."""

from __future__ import annotations

from dataclasses import replace

from dualparal.method.grid import Grid
from dualparal.planning.job_plan import JobPlan, plan_job
from dualparal.planning.layer_split import split_layers
from dualparal.planning.placement import ModelSizes


def in_other_rings(plan: JobPlan, model: ModelSizes) -> JobPlan | None:
    """`plan` with its guidance halves side by side where they take turns, or the other way round, its layers split evenly; None
    where the video has no guidance, the ranks do not make two rings, or one ring would have more ranks than there are layers.

    A video whose halves went in one batch has them one by one then: other bits, within 1e-5.
    """
    guidance, ranks = 3 - plan.placement.guidance, plan.placement.grid.ranks
    num_layers = sum(plan.placement.layers)
    if not plan.request.has_guidance or ranks % guidance or ranks // guidance > num_layers:
        return None
    layers = split_layers(num_layers, Grid.of(ranks, guidance).stages)
    placement = replace(plan.placement, guidance=guidance, layers=tuple(len(stage) for stage in layers))
    request = plan.request.model_copy(update={"micro_batches": True})
    return plan_job(request, model, placement, speed=plan.speed)
