"""What few steps mean for many ranks: blocks in flight are never more than steps, so that ranks wait; and what a second ring
has to do where there is no guidance. Pure arithmetic."""

from __future__ import annotations

from dualparal.method.grid import Grid
from dualparal.request import Settings


def idle_ranks(request: Settings, grid: Grid) -> str:
    """One sentence when the ranks of `grid` cannot be busy with this video, else ""."""
    num_steps = request.num_inference_steps
    if grid.guidance > 1:
        if not request.has_guidance:
            return (
                f"without guidance half of the {grid.ranks} ranks have nothing to do: --guidance_parallel 1 makes it in about "
                "half the time"
            )
        if grid.stages <= num_steps:
            return ""
        best = num_steps * grid.guidance
        return (
            f"with {num_steps} step{'s' * (num_steps > 1)} about {best} of {grid.ranks} ranks are busy: --ranks {best} takes "
            "no longer, where the layers fit"
        )
    num_ranks = grid.ranks
    at_once = num_steps * (2 if request.micro_batches and request.has_guidance else 1)  # halves travel one by one
    if num_ranks <= at_once:
        return ""
    replicas = num_ranks // at_once
    instead = (
        f"--ranks {at_once} --replicas {replicas} makes {replicas} videos at a time, where the layers fit"
        if replicas > 1
        else f"--ranks {at_once} takes no longer, where the layers fit"
    )
    steps, blocks = (f"{num_steps} {what}{'s' * (num_steps > 1)}" for what in ("step", "block"))
    return f"with {steps} at most {blocks} are in flight, so about {at_once} of {num_ranks} ranks are busy: {instead}"
