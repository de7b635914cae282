"""A stage that sleeps for as long as its work would take: the engine's real order of work on any number of ranks, whatever
the number of cores.

The costs are the event model's own: linear in the frames that run through the layers, shared by the ranks by their layers.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from benchmarks.null_stage import NullStage
from dualparal.method.event_model import even_cost
from dualparal.method.schedule import Item, Schedule

FORWARD_MS = "DUALPARAL_BENCH_FORWARD_MS"  # what an ordinary block step costs over all layers


class TimedStage(NullStage):
    """A null stage whose `run` takes its share of one forward."""

    def __init__(self, stage: Any, stages: int) -> None:
        """Of a ring of so many `stages`."""
        super().__init__(stage)
        self._stages = stages
        self._unit_s = float(os.environ[FORWARD_MS]) / 1000

    def begin(self, shape: Any, schedule: Schedule, conditions: Any) -> None:
        super().begin(shape, schedule, conditions)
        self._cost = even_cost(schedule, self._stages)

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        until_s = time.monotonic() + self._cost(item, 0) * self._unit_s
        out = super().run(item, incoming)
        time.sleep(max(0.0, until_s - time.monotonic()))
        return out


def install(*, rank: int | None, **parts: Any) -> dict[str, Any]:
    """Worker hook: every rank gets a sleeping stage."""
    return {} if rank is None else {"stage": TimedStage(parts["stage"], parts["links"].grid.stages)}
