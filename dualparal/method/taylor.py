"""The extrapolation of skipped steps: a block's last prediction and its divided differences.

Follows `TaylorSeerState` of diffusers (hooks/taylorseer_cache.py), there applied to a module's output, here to the prediction
of one block after guidance; guidance is linear in both halves, so the two say the same. Which steps are skipped is the
schedule's affair.
"""

from __future__ import annotations

import math

import torch

from dualparal.method.schedule import Mode


class Taylor:
    """What one block remembers: factor i is the i-th divided difference of its predictions, [1, C, F, h, w] float32."""

    def __init__(self, max_order: int) -> None:
        self._max_order = max_order
        self._factors: list[torch.Tensor] = []
        self._step = 0
        self._mode: Mode = (0, True)

    def update(self, step: int, prediction: torch.Tensor, mode: Mode) -> None:
        """Take note of a computed `prediction`; it is kept, so nobody may write into it."""
        known = self._factors if mode == self._mode else []
        factors = [prediction]
        for before in known[: self._max_order]:
            factors.append((factors[-1] - before) / (step - self._step))
        self._factors, self._step, self._mode = factors, step, mode

    def predict(self, step: int) -> torch.Tensor:
        """The prediction at a later `step` of the same mode."""
        offset = step - self._step
        found = self._factors[0]
        for order, factor in enumerate(self._factors[1:], 1):
            found = found + factor * (offset**order / math.factorial(order))
        return found

    def state(self) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """(counts, tensors) from which `restore` goes on with the same bits; nothing is copied."""
        expert, is_guided = self._mode
        counts = {"taylor_step": self._step, "taylor_expert": expert, "taylor_guided": int(is_guided)}
        return counts, {f"factors.{order}": factor for order, factor in enumerate(self._factors)}

    def restore(self, counts: dict[str, int], factors: list[torch.Tensor]) -> None:
        """Take up what `state` gave, the factors in their order."""
        self._step, self._factors = counts["taylor_step"], factors
        self._mode = counts["taylor_expert"], bool(counts["taylor_guided"])
