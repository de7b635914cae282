"""Per-block sampler: each block steps its own multistep UniPC (METHOD.md, "One sweep", step 4).

A thin hold on diffusers' `UniPCMultistepScheduler`; follows `WanPipeline` in how it is set up.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from dualparal.core.schedule import Mode
from dualparal.core.taylor import Taylor
from dualparal.errors import CheckpointError

_COUNTS = ("lower_order_nums", "this_order")  # of UniPC, besides its step index


class SamplerFactory:
    """Makes one fresh sampler per block. `timesteps` [num_steps] int64 are shared by all of them, noisiest first."""

    def __init__(self, config: dict[str, Any], *, num_steps: int, flow_shift: float, device: torch.device | str) -> None:
        """`config` is the checkpoint's scheduler_config.json; `flow_shift` replaces its own."""
        name = config.get("_class_name", "UniPCMultistepScheduler")
        if name != "UniPCMultistepScheduler":
            raise CheckpointError(f"the checkpoint's scheduler is {name}; only UniPCMultistepScheduler is supported")
        known = inspect.signature(UniPCMultistepScheduler.__init__).parameters
        values = {key: value for key, value in config.items() if key in known and not key.startswith("_")}
        self._template = UniPCMultistepScheduler(**{**values, "flow_shift": flow_shift})
        self._template.set_timesteps(num_steps, device=device)
        self._template.set_begin_index(0)
        self.timesteps: torch.Tensor = self._template.timesteps
        self.num_train_timesteps = int(self._template.config.num_train_timesteps)

    def new(self, max_order: int | None = None) -> BlockSampler:
        """A sampler for one block, at its first step; `max_order` of extrapolation where steps are skipped."""
        return BlockSampler(copy.deepcopy(self._template), max_order)

    def experts(self, boundary_ratio: float | None) -> tuple[int, ...]:
        """Which expert runs each step: 1 (low noise) where t < boundary_ratio * num_train_timesteps, else 0."""
        return experts_of(self.timesteps.tolist(), boundary_ratio, self.num_train_timesteps)


def experts_of(timesteps: Sequence[float], boundary_ratio: float | None, num_train_timesteps: int) -> tuple[int, ...]:
    """See `SamplerFactory.experts`."""
    if boundary_ratio is None:
        return (0,) * len(timesteps)
    return tuple(int(t < boundary_ratio * num_train_timesteps) for t in timesteps)


class BlockSampler:
    """The multistep state of one block, and where steps are skipped what it extrapolates them from."""

    def __init__(self, scheduler: UniPCMultistepScheduler, max_order: int | None = None) -> None:
        self._scheduler = scheduler
        self._step = 0
        self._taylor = None if max_order is None else Taylor(max_order)

    def note(self, prediction: torch.Tensor, mode: Mode) -> None:
        """Remember the present step's computed prediction, if steps are skipped at all."""
        if self._taylor is not None:
            self._taylor.update(self._step, prediction, mode)

    def predict(self) -> torch.Tensor:
        """The prediction of the present step, extrapolated from those noted."""
        assert self._taylor is not None
        return self._taylor.predict(self._step)

    def step(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Latents one step cleaner. `prediction` and `latents` [1, C, F, h, w] float32; neither is changed.

        UniPC keeps `latents` as its last sample: the caller must never write into it again.
        """
        timestep = self._scheduler.timesteps[self._step]
        self._step += 1
        result: torch.Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return result

    def state(self) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """(counts, tensors) from which `restore` goes on with the same bits. Nothing is copied: UniPC never writes into the
        tensors it holds."""
        scheduler = self._scheduler
        counts = {"step": self._step, **{name: int(getattr(scheduler, name)) for name in _COUNTS if hasattr(scheduler, name)}}
        tensors = {f"model_outputs.{i}": x for i, x in enumerate(scheduler.model_outputs) if x is not None}
        tensors |= {f"timestep_list.{i}": torch.as_tensor(x) for i, x in enumerate(scheduler.timestep_list) if x is not None}
        if scheduler.last_sample is not None:
            tensors["last_sample"] = scheduler.last_sample
        if self._taylor is not None:
            noted, factors = self._taylor.state()
            counts, tensors = counts | noted, tensors | factors
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
            if name == "timestep_list":
                scheduler.timestep_list[int(index)] = value.to(device)
            elif name == "model_outputs":
                scheduler.model_outputs[int(index)] = value.to(device)
            elif name == "last_sample":
                scheduler.last_sample = value.to(device)
