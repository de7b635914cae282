"""Stand-ins for prompt embeddings, shared by tests of the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualparal.method.schedule import Rules

TEXT_DIM = 32


def some_texts(
    num_texts: int = 1, *, guided: bool = True, lengths: Sequence[int] = (7, 7), seed: int = 11
) -> list[list[torch.Tensor]]:
    """`num_texts` texts as [cond, uncond] (or [cond]), each [1, L, 32]; `lengths` are those of cond and uncond."""
    generator = torch.Generator().manual_seed(seed)
    halves = lengths[: 2 if guided else 1]
    return [[torch.randn(1, length, TEXT_DIM, generator=generator) for length in halves] for _ in range(num_texts)]


def joined(blocks: dict[int, torch.Tensor]) -> torch.Tensor:
    """All blocks along time."""
    assert sorted(blocks) == list(range(len(blocks)))
    return torch.cat([blocks[number] for number in sorted(blocks)], dim=2)


def as_said(rules: Rules) -> dict[str, Any]:
    """What the twin is told of a schedule's rules; micro-batches are the engine's own affair."""
    said = {
        name: getattr(rules, name)
        for name in ("left_context", "context", "max_in_flight", "stagger", "guided_steps", "refresh")
    }
    cache = rules.step_cache
    return {**said, "step_cache": cache and (cache.interval, cache.max_order, cache.before, cache.after)}
