"""What both training scripts share: an averaged copy of the weights, checkpoints to resume from, a log of losses.

It knows nothing of what is trained.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Ema:
    """An exponential moving average of a model's parameters, which samples better than the last step's weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.step = 0
        self.shadow = {name: value.detach().clone() for name, value in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in model.named_parameters():
            self.shadow[name].lerp_(value.detach(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model holds the averaged weights."""
        kept = {name: value.detach().clone() for name, value in model.named_parameters()}
        model.load_state_dict(self.shadow, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(kept, strict=False)


def learning_rate(step: int, num_steps: int, *, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, num_steps - warm_up))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint so that a kill at any moment leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return state


class TrainingLog:
    """Appends one JSON line per report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()

    def write(self, **values: Any) -> None:
        record = {"seconds": round(time.time() - self.started, 1), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
