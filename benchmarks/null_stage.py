"""A stage that computes nothing: what is left is the engine's own time."""

from __future__ import annotations

from typing import Any

import torch

from dualparal.core.schedule import Item
from dualparal.model.stage import Stage


class NullStage:
    """A real stage's sizes and messages, with `run` replaced by tensors made beforehand."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor:
        if self._stage.is_last:
            return torch.zeros(self._stage.prediction_shape(item))
        return torch.zeros(self._stage.hidden_shape(item))


def install(*, rank: int | None, **parts: Any) -> dict[str, Any]:
    """Worker hook: every rank gets a null stage."""
    return {} if rank is None else {"stage": NullStage(parts["stage"])}
