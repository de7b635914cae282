"""A stage that computes nothing: what is left is the engine's own time."""

from __future__ import annotations

import cProfile
import os
from typing import Any

import torch

from dualparal.method.schedule import Item
from dualparal.model.stage import Stage

PROFILE = "DUALPARAL_BENCH_PROFILE"  # file that the hooked rank's profile of the last job goes to


class NullStage:
    """A real stage's sizes and messages, with `run` replaced by tensors made beforehand."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._profile = cProfile.Profile() if PROFILE in os.environ else None

    def begin(self, *args: Any) -> None:
        self._stage.begin(*args)
        if self._profile:
            self._profile.enable()

    def end(self) -> None:
        if self._profile:
            self._profile.disable()
            self._profile.dump_stats(f"{os.environ[PROFILE]}.{os.getpid()}")
        self._stage.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        if self._stage.is_last:
            is_there = item.is_whole or self._stage.ring is not None
            return torch.zeros(self._stage.prediction_shape(item)) if is_there else None
        return torch.zeros(self._stage.hidden_shape(item))


def install(*, rank: int | None, **parts: Any) -> dict[str, Any]:
    """Worker hook: every rank gets a null stage."""
    return {} if rank is None else {"stage": NullStage(parts["stage"])}
