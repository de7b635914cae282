"""Coordinated initial noise (METHOD.md, "Initial noise"): all blocks share one pool of Gaussian frames, reshuffled.

Noise depends on the seed and the shape only: it is drawn on the CPU in float32, whatever runs the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from dualparal.method.plan import BlockPlan


class CoordinatedNoise:
    """An iterator over each block's noise in order, [1, channels, len(block), height, width] float32 on the CPU.

    `height` and `width` are those of the latents. The recurrence, for a pool of `num_per_block + num_cat` frames:

        perm = random permutation of all pool frames but the last num_cat
        pool = [last num_cat of the pool | the permuted rest]
        block takes the last len(block) frames of the pool

    so no frame's noise repeats within [left context | own]. Every scene draws a pool of its own, the generator going on.
    """

    def __init__(self, plan: BlockPlan, num_per_block: int, seed: int, *, channels: int, height: int, width: int) -> None:
        self._plan, self._num_per_block, self._block = plan, num_per_block, 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._shape = (1, channels, num_per_block + plan.num_cat, height, width)
        self._drawn = torch.empty(0)  # a scene's pool as it was drawn
        self._order = torch.arange(self._shape[2])  # which of its frames stands where by now

    def follow(self, plan: BlockPlan) -> None:
        """Go on with the blocks of `plan`, which has those that were drawn so far."""
        self._plan = plan

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        block = self._block
        if block == self._plan.num_blocks:
            raise StopIteration
        self.skip()
        return self._drawn[:, :, self._order[len(self._order) - self._plan.lengths[block] :]]

    def skip(self) -> None:
        """Pass over the next block: the same draws, and no more than a few numbers are moved."""
        num_per_block = self._num_per_block
        if self._plan.begins_scene(self._block):
            self._drawn = torch.randn(self._shape, generator=self._generator, dtype=torch.float32)
            self._order = torch.arange(self._shape[2])
        perm = torch.randperm(num_per_block, generator=self._generator)
        self._order = torch.cat([self._order[num_per_block:], self._order[:num_per_block][perm]])
        self._block += 1


coordinated_noise = CoordinatedNoise


class Ghost:
    """What block 0 sees of latents that are never denoised (METHOD.md, "Continuing"): at each of its steps as noisy as itself,
    with noise of that step's own, or clean, for a model that knows clean latents beside noise. On the CPU in float32, so that
    halves, experts and ranks agree, and resume repeats it."""

    def __init__(self, latents: torch.Tensor, seed: int, sigmas: Sequence[float], *, is_clean: bool = False) -> None:
        """`latents` [1, C, F, h, w] normalised; `sigmas[s]` is the noise level of step s."""
        self._latents, self._seed, self._sigmas, self._is_clean = latents.float().cpu(), seed, sigmas, is_clean

    def seen_at(self, step: int) -> torch.Tensor:
        """(1 - sigma) * latents + sigma * noise; the latents themselves when they are clean."""
        if self._is_clean:
            return self._latents
        digest = hashlib.sha256(f"{self._seed} ghost {step}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(self._latents.shape, generator=generator, dtype=torch.float32)
        return (1 - self._sigmas[step]) * self._latents + self._sigmas[step] * noise
