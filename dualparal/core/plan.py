"""Block plan: how `latents_num` latent frames are cut into blocks (METHOD.md, "Block plan").

The first block is `num_cat` frames longer, because nothing precedes it; the last may be shorter. All lengths are in latent
frames. Knows nothing of time or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualparal.request import TEMPORAL_FACTOR


@dataclass(frozen=True)
class BlockPlan:
    """`lengths[b]` latent frames belong to block b; each block attends to `num_cat` frames of its neighbours."""

    lengths: tuple[int, ...]
    num_cat: int

    @classmethod
    def of(cls, latents_num: int, num_per_block: int, num_cat: int) -> BlockPlan:
        """Cut `latents_num` frames: a first block of `num_per_block + num_cat`, then blocks of `num_per_block`."""
        if latents_num < 1 or num_per_block < 1 or not 0 <= num_cat <= num_per_block:
            raise ValueError(f"no block plan for {latents_num=}, {num_per_block=}, {num_cat=}")
        first = min(latents_num, num_per_block + num_cat)
        rest = latents_num - first
        tail = (rest % num_per_block,) if rest % num_per_block else ()
        return cls((first, *(num_per_block,) * (rest // num_per_block), *tail), num_cat)

    @property
    def num_blocks(self) -> int:
        return len(self.lengths)

    @property
    def latents_num(self) -> int:
        return sum(self.lengths)

    def start(self, block: int) -> int:
        """Index of the block's first latent frame in the video."""
        return sum(self.lengths[:block])

    def num_left(self, block: int) -> int:
        """Latent frames of left context: the last `num_cat` of block - 1; none for the first block."""
        return min(self.num_cat, self.lengths[block - 1]) if block else 0

    def num_kept(self, block: int) -> int:
        """First latent frames of `block` that serve block - 1 as right context: `num_cat`, or all of a shorter block."""
        return min(self.num_cat, self.lengths[block])

    def num_right(self, block: int) -> int:
        """Latent frames of right context that block + 1 can offer; none for the last block."""
        return self.num_kept(block + 1) if block + 1 < self.num_blocks else 0

    def frames(self, block: int) -> range:
        """Video frames that the block decodes to; the very first latent frame holds one, every other four."""
        start, end = self.start(block), self.start(block) + self.lengths[block]
        return range(max(0, start * TEMPORAL_FACTOR - 3), max(0, end * TEMPORAL_FACTOR - 3))
