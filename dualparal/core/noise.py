"""Coordinated initial noise (METHOD.md, "Initial noise"): all blocks share one pool of Gaussian frames, reshuffled.

Noise depends on the seed and the shape only: it is drawn on the CPU in float32, whatever runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dualparal.core.plan import BlockPlan


def coordinated_noise(
    plan: BlockPlan, num_per_block: int, seed: int, *, channels: int, height: int, width: int
) -> Iterator[torch.Tensor]:
    """Yield each block's noise in order, [1, channels, len(block), height, width] float32 on the CPU.

    `height` and `width` are those of the latents. The recurrence, for a pool of `num_per_block + num_cat` frames:

        perm = random permutation of all pool frames but the last num_cat
        pool = [last num_cat of the pool | the permuted rest]
        block takes the last len(block) frames of the pool

    so no frame's noise repeats within [left context | own].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    num_cat = plan.num_cat
    pool = torch.randn(1, channels, num_per_block + num_cat, height, width, generator=generator, dtype=torch.float32)
    for length in plan.lengths:
        perm = torch.randperm(num_per_block, generator=generator)
        pool = torch.cat([pool[:, :, num_per_block:], pool[:, :, :num_per_block][:, :, perm]], dim=2)
        yield pool[:, :, pool.shape[2] - length :].clone()
