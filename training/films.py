"""Films that the student makes, block by block as the engine does, and where the teacher goes from each of their states.

Blocks enter one sweep after another and each sees its left neighbour as K and V that its pass at the same step left there, and
its right neighbour as those of the pass just before, a step noisier (`context="cached"`, stagger 1; METHOD.md, "One sweep").
The teacher sees several blocks at once at one noise level, two of them and some latents on either side, as windows that it was
trained on: so what is aimed at goes on across every border.

Shapes: S steps of the student, f films, z latent channels, t latents, 8 x 8 in space, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from dualparal.method.noise import coordinated_noise
from dualparal.method.plan import BlockPlan
from dualparal.model.feature_cache import KeyValue
from dualparal.pocket.world import training_prompts

NUM_PER_BLOCK = NUM_CAT = 8  # the pocket preset's
NUM_LATENTS = 48  # of a film: five blocks
NUM_FILMS = 4  # made at once
SUBSTEPS = (1, 1, 1, 2)  # of the midpoint rule, for the teacher's way along each step of the student
TEACHERS_CONTEXT = 4  # latents on either side of its two blocks

Text = tuple[torch.Tensor, torch.Tensor]
Caches = dict[int, KeyValue]  # by layer: K, V of a block's last `NUM_CAT` latents, which are the first too but of block 0
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


class TwoModels(Protocol):
    """The student and its teacher."""

    def read(self, captions: list[str]) -> Text: ...

    def guided(self, x: torch.Tensor, level: float, text: Text, nothing: Text) -> torch.Tensor: ...

    def pass_of(
        self, x: torch.Tensor, level: float, text: Text, left: Caches | None, right: Caches | None, num_left: int = 0
    ) -> tuple[torch.Tensor, Caches]: ...


@dataclass(frozen=True)
class Films:
    """`x[b][s]` [f, z, t, 8, 8] is block b before step s, `target[b][s]` the velocity to take there, `caches[b][s]` what its
    pass left for its neighbours. Half precision."""

    captions: list[str]
    x: list[torch.Tensor]
    target: list[torch.Tensor]
    caches: list[list[Caches]]

    def around(self, block: int, step: int) -> tuple[Caches | None, Caches | None]:
        """K and V that the block's neighbours have left when it comes to that step, float32."""
        left = self.caches[block - 1][step] if block else None
        right = self.caches[block + 1][step - 1] if step and block + 1 < len(self.x) else None
        return _float(left), _float(right)


def _float(caches: Caches | None) -> Caches | None:
    return caches and {layer: (key.float(), value.float()) for layer, (key, value) in caches.items()}


def block_plan() -> BlockPlan:
    """How a film is cut."""
    return BlockPlan.of(NUM_LATENTS, NUM_PER_BLOCK, NUM_CAT)


@torch.no_grad()
def make_films(models: TwoModels, levels: Sequence[float], rng: np.random.Generator, channels: int) -> Films:
    """The student's own way from noise, and where the teacher goes from each of its states."""
    known, plan = training_prompts(), block_plan()
    captions = [known[int(i)].caption for i in rng.integers(len(known), size=NUM_FILMS)]
    text, nothing = models.read(captions), models.read([""] * NUM_FILMS)
    seeds = [int(seed) for seed in rng.integers(2**31, size=NUM_FILMS)]
    films = [coordinated_noise(plan, NUM_PER_BLOCK, seed, channels=channels, height=8, width=8) for seed in seeds]
    noise = [torch.cat(blocks) for blocks in zip(*films, strict=True)]
    states, caches = student_way(models, noise, levels, text)
    x = [torch.stack(way) for way in states]  # [S, f, z, t, 8, 8] of each block
    target = [torch.empty_like(way) for way in x]
    groups = groups_of_blocks(plan.num_blocks, starts_late=bool(rng.integers(2)))
    for step, (here, there) in enumerate(pairwise(levels)):
        whole = torch.cat([way[step] for way in x], dim=2)
        for group in groups:
            first, end = (sum(plan.lengths[:b]) for b in (group.start, group.stop))
            window = slice(max(0, first - TEACHERS_CONTEXT), min(NUM_LATENTS, end + TEACHERS_CONTEXT))
            aim = teachers_way(
                lambda y, level: models.guided(y, level, text, nothing), whole[:, :, window], here, there, SUBSTEPS[step]
            )
            parts = aim[:, :, first - window.start : end - window.start].split([plan.lengths[b] for b in group], dim=2)
            for block, part in zip(group, parts, strict=True):
                target[block][step] = part
    return Films(captions, [way.half() for way in x], [way.half() for way in target], caches)


def student_way(
    models: TwoModels, noise: list[torch.Tensor], levels: Sequence[float], text: Text
) -> tuple[list[list[torch.Tensor]], list[list[Caches]]]:
    """Every block's latents [f, z, t, 8, 8] before each step, and what each of its passes left, half precision. The order is
    the engine's: sweep after sweep, the newest block first."""
    num_steps, x = len(levels) - 1, list(noise)
    states: list[list[torch.Tensor]] = [[] for _ in noise]
    caches: list[list[Caches]] = [[] for _ in noise]
    for sweep in range(len(noise) + num_steps - 1):
        for block in reversed(range(max(0, sweep - num_steps + 1), min(len(noise), sweep + 1))):
            step = sweep - block
            left = _float(caches[block - 1][step]) if block else None
            right = _float(caches[block + 1][step - 1]) if step and block + 1 < len(noise) else None
            states[block].append(x[block])
            velocity, kept = models.pass_of(x[block], levels[step], text, left, right)
            caches[block].append({layer: (key.half(), value.half()) for layer, (key, value) in kept.items()})
            x[block] = x[block] + (levels[step + 1] - levels[step]) * velocity
    return states, caches


def groups_of_blocks(num_blocks: int, *, starts_late: bool) -> list[range]:
    """Pairs of blocks, the first one alone, for it is twice as long: [0] [1 2] [3 4]; or late [0] [1] [2 3] [4]."""
    starts = [0, 1, *range(2 if starts_late else 3, num_blocks, 2)]
    return [range(a, b) for a, b in pairwise([*starts, num_blocks])]


def teachers_way(guided: Velocity, x: torch.Tensor, here: float, there: float, num_substeps: int) -> torch.Tensor:
    """The mean velocity of the teacher from level `here` to `there`, by the midpoint rule."""
    y, size = x, (there - here) / num_substeps
    for substep in range(num_substeps):
        level = here + substep * size
        first = guided(y, level)
        y = y + size * guided(y + size / 2 * first, level + size / 2)
    return (y - x) / (there - here)
