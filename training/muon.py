"""Muon: momentum whose update is made orthogonal, for matrices and for filters seen as matrices (Jordan et al., 2024).

It learns in fewer steps than AdamW. Written here in float32 and with equal shapes in one batch, because torch's own works in
bfloat16, which a CPU emulates. Updates are scaled to the size AdamW's usually have, so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch


def orthogonalize(matrices: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, of a batch [n, rows, columns], by Newton and Schulz's iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """For matrices [out, in] and filters [out, in, ...] only; biases, gains and embeddings belong to AdamW."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state, gradient = self.state[parameter], parameter.grad
                    assert gradient is not None
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                orthogonal = orthogonalize(torch.stack(updates).flatten(2))
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.add_(update.view(shape), alpha=-group["lr"] * scale)


def build_optimizers(
    model: torch.nn.Module, lr: float, *, keep_out: tuple[str, ...] = ()
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the model's matrices and filters, AdamW for the rest and for names that contain one of `keep_out`."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and min(parameter.shape[0], parameter.shape[1:].numel()) > 1
        (matrices if is_matrix and not any(k in name for k in keep_out) else others).append(parameter)
    return Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
