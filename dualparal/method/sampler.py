"""Per-block sampler: each block steps its own multistep solver (METHOD.md, "One sweep", step 4).

A thin hold on diffusers' schedulers for flow matching; follows `WanPipeline` in how they are set up.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dualparal.errors import CheckpointError
from dualparal.method.schedule import Mode
from dualparal.method.taylor import Taylor
from dualparal.method.unipc import SharedUniPC
from dualparal.request import SolverName

_COUNTS = ("lower_order_nums", "this_order")  # of a multistep solver, besides its step index
_LISTS = ("model_outputs", "timestep_list")


class SamplerFactory:
    """Makes one fresh sampler per block. `timesteps` [num_steps], noisiest first, are shared by all of them: int64, of `euler`
    float32."""

    def __init__(
        self, config: dict[str, Any], *, num_steps: int, flow_shift: float, device: torch.device | str,
        solver: SolverName = "unipc",
    ) -> None:  # fmt: skip
        """`config` is the checkpoint's scheduler_config.json; `flow_shift` replaces its own. Its other values count for
        `unipc`, and for `dpm++` where that knows them."""
        name = config.get("_class_name", "UniPCMultistepScheduler")
        if name != "UniPCMultistepScheduler":
            raise CheckpointError(f"the checkpoint's scheduler is {name}; only UniPCMultistepScheduler is supported")
        self._template = scheduler_of(solver, config, flow_shift)
        self._template.set_timesteps(num_steps, device=device)
        self._template.set_begin_index(0)
        self.timesteps: torch.Tensor = self._template.timesteps
        self.sigmas: tuple[float, ...] = tuple(self._template.sigmas.tolist())  # noise level before each step, and at the end
        self.num_train_timesteps = int(self._template.config.num_train_timesteps)

    def new(self, max_order: int | None = None) -> BlockSampler:
        """A sampler for one block, at its first step; `max_order` of extrapolation where steps are skipped."""
        scheduler = copy.copy(self._template)  # no solver writes into its tensors; its lists are all that changes in place
        for name in _LISTS:
            if hasattr(scheduler, name):
                setattr(scheduler, name, list(getattr(scheduler, name)))
        return BlockSampler(scheduler, max_order)

    def experts(self, boundary_ratio: float | None) -> tuple[int, ...]:
        """Which expert runs each step: 1 (low noise) where t < boundary_ratio * num_train_timesteps, else 0."""
        return experts_of(self.timesteps.tolist(), boundary_ratio, self.num_train_timesteps)


class EvenEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler on an even division of [0, 1] before the shift, as step-distilled models were trained: left to itself it
    ends at its smallest sigma."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """The steps' sigmas and timesteps, noisiest first."""
        even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=even, device=device)


def scheduler_of(solver: SolverName, config: Mapping[str, Any], flow_shift: float) -> Any:
    """diffusers' scheduler for `solver`; see `SamplerFactory`."""
    if solver == "euler":
        return EvenEuler(num_train_timesteps=config.get("num_train_timesteps", 1000), shift=flow_shift)
    kind = DPMSolverMultistepScheduler if solver == "dpm++" else SharedUniPC
    known = inspect.signature(kind.__init__).parameters
    values = {key: value for key, value in config.items() if key in known and not key.startswith("_")}
    return kind(**{**values, "flow_shift": flow_shift})


def experts_of(timesteps: Sequence[float], boundary_ratio: float | None, num_train_timesteps: int) -> tuple[int, ...]:
    """See `SamplerFactory.experts`."""
    if boundary_ratio is None:
        return (0,) * len(timesteps)
    return tuple(int(t < boundary_ratio * num_train_timesteps) for t in timesteps)


class BlockSampler:
    """The multistep state of one block, and where steps are skipped what it extrapolates them from."""

    def __init__(self, scheduler: Any, max_order: int | None = None) -> None:
        self._scheduler = scheduler
        self._step = 0
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # latents before the last step, prediction
        self._taylor = None if max_order is None else Taylor(max_order)

    def record(self, prediction: torch.Tensor, mode: Mode) -> None:
        """Remember the present step's computed prediction, if steps are skipped at all."""
        if self._taylor is not None:
            self._taylor.update(self._step, prediction, mode)

    def predict(self) -> torch.Tensor:
        """The prediction of the present step, extrapolated from those recorded."""
        assert self._taylor is not None
        return self._taylor.predict(self._step)

    def step(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Latents one step cleaner. `prediction` and `latents` [1, C, F, h, w] float32; neither is changed.

        A solver may keep `latents` as its last sample: the caller must never write into it again.
        """
        timestep = self._scheduler.timesteps[self._step]
        self._last = latents, prediction
        self._step += 1
        result: torch.Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return result

    @property
    def clean(self) -> torch.Tensor:
        """What the last step's prediction says the clean latents are: x₀ = x_σ − σ·v."""
        assert self._last is not None
        latents, prediction = self._last
        return latents - self._scheduler.sigmas[self._step - 1] * prediction

    def state(self) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """(counts, tensors) from which `restore` goes on with the same bits. Nothing is copied: solvers never write into the
        tensors they hold."""
        scheduler = self._scheduler
        counts = {"step": self._step, **{name: int(getattr(scheduler, name)) for name in _COUNTS if hasattr(scheduler, name)}}
        held = {f"{name}.{i}": x for name in _LISTS for i, x in enumerate(getattr(scheduler, name, ())) if x is not None}
        tensors = {key: torch.as_tensor(x) for key, x in held.items()}
        if getattr(scheduler, "last_sample", None) is not None:
            tensors["last_sample"] = scheduler.last_sample
        if self._taylor is not None:
            counted, factors = self._taylor.state()
            counts, tensors = counts | counted, tensors | factors
        return counts, tensors

    def restore(self, counts: dict[str, int], tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `state` gave; `self` must be a fresh sampler of the same factory."""
        scheduler = self._scheduler
        self._step = counts["step"]
        for name in _COUNTS:
            if name in counts:
                setattr(scheduler, name, counts[name])
        if self._step:
            scheduler._step_index = self._step
        device = scheduler.timesteps.device
        if self._taylor is not None:
            orders = range(sum(key.startswith("factors.") for key in tensors))
            self._taylor.restore(counts, [tensors[f"factors.{order}"].to(device) for order in orders])
        for key, value in tensors.items():
            name, _, index = key.partition(".")
            if name in _LISTS:
                getattr(scheduler, name)[int(index)] = value.to(device)
            elif name == "last_sample":
                scheduler.last_sample = value.to(device)
