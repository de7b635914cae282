"""Block plan: how `latents_num` latent frames are cut into blocks (METHOD.md, "Block plan" and "Prompts over time").

The first block is `num_cat` frames longer, because nothing precedes it; the last may be shorter. Where a film has shots, each
begins at a block's border. A ghost ("Continuing") is what precedes the first block and is never denoised. All lengths are in
latent frames. Knows nothing of time or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualparal.request import TEMPORAL_FACTOR

# Of a film's end, kept for one that continues it: a decoder that was primed with so many gives its frames as one decode of both
# films does, but for one step of 255 (`benchmarks.primed_decode`).
KEPT_LATENTS = 24
# Encoded before those of a video file's end: the encoder knows the past, and begins without one (same benchmark, --encoder).
SETTLING_LATENTS = 8


@dataclass(frozen=True)
class BlockPlan:
    """`lengths[b]` latent frames belong to block b; each block attends to `num_cat` frames of its neighbours.

    `cuts`: the blocks besides the first that begin a scene; nothing is seen or decoded across such a border. `ghost` latent
    frames are there before the first block and are seen by it; with `is_ghost_shown` they are the film's first.
    """

    lengths: tuple[int, ...]
    num_cat: int
    cuts: tuple[int, ...] = ()
    ghost: int = 0
    is_ghost_shown: bool = False

    @classmethod
    def of(cls, latents_num: int, num_per_block: int, num_cat: int, *, picture: bool = False, before: int = 0) -> BlockPlan:
        """Cut `latents_num` frames: a first block of `num_per_block + num_cat`, then blocks of `num_per_block`. With a
        `picture` the first of them is a ghost, and all blocks are alike; so they are with a ghost of `before` more frames."""
        if latents_num - picture < 1 or num_per_block < 1 or not 0 <= num_cat <= num_per_block:
            raise ValueError(f"no block plan for {latents_num=}, {num_per_block=}, {num_cat=}")
        first = min(latents_num - picture, num_per_block + (0 if picture or before else num_cat))
        rest = latents_num - picture - first
        tail = (rest % num_per_block,) if rest % num_per_block else ()
        lengths = (first, *(num_per_block,) * (rest // num_per_block), *tail)
        return cls(lengths, num_cat, ghost=before or int(picture), is_ghost_shown=picture)

    @classmethod
    def of_scenes(
        cls, scenes: Sequence[Sequence[int]], num_per_block: int, num_cat: int, *, picture: bool = False, before: int = 0
    ) -> BlockPlan:
        """Cut a film whose scenes have shots of these lengths: a scene begins with a block of at most `num_per_block + num_cat`
        of its first shot; every other piece becomes as few blocks as can be, as even as can be, the longer ones first. With a
        `picture` the film's first latent is a ghost, and its first block is no longer than others; so it is with a ghost of
        `before` more frames."""
        if picture and scenes[0][0] < 2:
            raise ValueError(f"no block plan for {scenes=} that begin with a picture")
        if num_per_block < 1 or not 0 <= num_cat <= num_per_block or any(length < 1 for shots in scenes for length in shots):
            raise ValueError(f"no block plan for {scenes=}, {num_per_block=}, {num_cat=}")
        lengths: list[int] = []
        cuts: list[int] = []
        for number, shots in enumerate(scenes):
            cuts.append(len(lengths))
            has_ghost = (picture or before > 0) and not number
            first = int(picture) if has_ghost else min(shots[0], num_per_block + num_cat)
            lengths += [] if has_ghost else [first]
            for piece in (shots[0] - first, *shots[1:]):
                count = -(-piece // num_per_block)
                lengths += [piece // count + (number < piece % count) for number in range(count)]
        return cls(tuple(lengths), num_cat, tuple(cuts[1:]), before or int(picture), picture)

    @property
    def num_blocks(self) -> int:
        return len(self.lengths)

    @property
    def latents_num(self) -> int:
        return sum(self.lengths)

    @property
    def num_frames(self) -> int:
        """Video frames: of each scene's first latent one, of every other four."""
        return TEMPORAL_FACTOR * self.latents_num - sum(map(self._missing, (0, *self.cuts)))

    def begins_scene(self, block: int) -> bool:
        """Whether nothing precedes the block: the first, and those after a cut."""
        return block == 0 or block in self.cuts

    def start(self, block: int) -> int:
        """Index of the block's first latent frame in the video."""
        return sum(self.lengths[:block])

    def num_left(self, block: int) -> int:
        """Latent frames of left context: the last `num_cat` of block - 1, or all of a shorter one; none for a scene's first,
        but for the ghost before block 0."""
        if block == 0:
            return min(self.num_cat, self.ghost)
        return 0 if self.begins_scene(block) else min(self.num_cat, self.lengths[block - 1])

    def num_kept(self, block: int) -> int:
        """First latent frames of `block` that serve block - 1 as right context: `num_cat`, or all of a shorter block."""
        return min(self.num_cat, self.lengths[block])

    def num_right(self, block: int) -> int:
        """Latent frames of right context that block + 1 can offer; none for a scene's last block."""
        return 0 if block + 1 == self.num_blocks or self.begins_scene(block + 1) else self.num_kept(block + 1)

    def num_frames_of(self, block: int) -> int:
        """Video frames that the block decodes to; a scene's first latent frame holds one, every other four. Those of a ghost
        that is shown come with block 0."""
        return TEMPORAL_FACTOR * self.lengths[block] - self._missing(block)

    def frames(self, block: int) -> range:
        """Which video frames these are."""
        start = TEMPORAL_FACTOR * self.start(block) - sum(self._missing(begin) for begin in (0, *self.cuts) if begin < block)
        return range(start, start + self.num_frames_of(block))

    @property
    def num_shown(self) -> int:
        """Latent frames of the film that are not denoised."""
        return self.ghost if self.is_ghost_shown else 0

    def _missing(self, block: int) -> int:
        """How many frames the block lacks of four for each of its latents."""
        if block == 0 and self.ghost:
            return (TEMPORAL_FACTOR - 1) - TEMPORAL_FACTOR * self.ghost if self.is_ghost_shown else 0
        return (TEMPORAL_FACTOR - 1) * self.begins_scene(block)
