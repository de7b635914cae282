"""The schedule of a completed request, whole or as much of it as decides what a job holds."""

from __future__ import annotations

from functools import lru_cache

from dualparal.method.schedule import make_schedule
from dualparal.request import Settings

schedule_of = lru_cache(maxsize=32)(make_schedule)  # a request is planned when typed, when checked and when taken


def shortened(request: Settings) -> Settings:
    """The same request with only as many blocks as can be in flight, and a few: what is held does not grow beyond them. One
    that recomputes cached left context now and then does so among these. No block of a timeline is longer than those of a film
    without."""
    enough = request.num_per_block * (request.num_inference_steps + 4) + request.num_cat
    if request.latents_num <= enough:
        return request
    refresh = request.refresh and min(request.refresh, request.num_inference_steps)
    return request.model_copy(update={"latents_num": enough, "refresh": refresh, "shots": None})


def experts_by_step(request: Settings, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """Which expert runs each step, as `sampler.SamplerFactory.experts` says it, from flow matching's timesteps alone."""
    boundary, num_steps = request.boundary_ratio, request.num_inference_steps
    if boundary is None:
        return (0,) * num_steps
    return tuple(
        int(_timestep(request, step, num_train_timesteps) < boundary * num_train_timesteps) for step in range(num_steps)
    )


def _timestep(request: Settings, step: int, num_train_timesteps: int) -> float:
    """What the model is told at `step`: of `euler` a float32, of the other solvers whole."""
    share, shift = step / request.num_inference_steps, request.flow_shift
    if request.solver == "euler":
        import numpy as np  # not before it is needed: the command line's help reads this file

        sigma = np.float32(1 - share)
        return float(shift * sigma / (1 + (shift - 1) * sigma) * np.float32(num_train_timesteps))
    span = 1 - 1 / num_train_timesteps
    level = span * (1 - share) if request.solver == "dpm++" else 1 - span * share
    return int(min(shift * level / (1 + (shift - 1) * level), 1 - 1e-6) * num_train_timesteps)  # UniPC keeps the first below 1
