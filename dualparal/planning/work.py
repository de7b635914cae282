"""Work of a job: exact FLOPs of every item on every stage, and with a measured rate its time.

FLOPs count two per multiply-add of matrix products and attention, as torch's FlopCounterMode does; norms and activations
(about 1 %) are left out. The event model turns them into times. Pure arithmetic, no torch, no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualparal.method.event_model import Forecast, ItemCost, forecast
from dualparal.method.schedule import Context, Item, Schedule
from dualparal.planning.sizes import DiTSizes


def query_and_key_frames(schedule: Schedule, item: Item) -> tuple[int, int]:
    """Latent frames of the window of `item`, and of what its self-attention sees: the window and the caches around it."""
    window = sum(schedule.window_frames(item))
    left = schedule.plan.num_left(item.block) if item.left is Context.CACHE else 0
    right = schedule.plan.num_right(item.block) if item.right is Context.CACHE else 0
    return window, left + window + right


def layer_flops(sizes: DiTSizes, num_tokens: int, num_keys: int, *, text_tokens: int = 512, num_halves: int = 2) -> int:
    """FLOPs of one layer for `num_halves` windows of `num_tokens` with `num_keys` keys (the text's K and V are kept)."""
    dim = sizes.dim
    projections = 6 * 2 * num_tokens * dim * dim  # q, k, v, out; text q, out
    attention = 2 * 2 * num_tokens * dim * (num_keys + text_tokens)
    ffn = 2 * 2 * num_tokens * dim * sizes.ffn_dim
    return num_halves * (projections + attention + ffn)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a job asks of each stage: `layers[r]` layers of the model on rank r, p = `tokens_per_frame`.

    `num_halves` is 2 with guidance and 1 without. Micro-batches are in the schedule.
    """

    sizes: DiTSizes
    schedule: Schedule
    layers: tuple[int, ...]
    tokens_per_frame: int
    num_halves: int = 2
    text_tokens: int = 512

    def halves_of(self, item: Item) -> int:
        """Guidance halves that travel with `item`."""
        return self.num_halves if item.half is None and item.is_guided else 1

    def layer_flops(self, item: Item) -> int:
        """FLOPs of `item` in one layer."""
        window, keys = (frames * self.tokens_per_frame for frames in query_and_key_frames(self.schedule, item))
        return layer_flops(self.sizes, window, keys, text_tokens=self.text_tokens, num_halves=self.halves_of(item))

    def embed_flops(self, item: Item) -> int:
        """FLOPs of the patch embedding: once, both guidance halves see the same latents."""
        return 2 * self.window_tokens(item) * self.sizes.in_channels * math.prod(self.sizes.patch_size) * self.sizes.dim

    def head_flops(self, item: Item) -> int:
        """FLOPs of the output head, which sees the own frames only."""
        patch = math.prod(self.sizes.patch_size)
        return self.halves_of(item) * 2 * self.own_tokens(item) * self.sizes.dim * self.sizes.out_channels * patch

    def moved_frames(self, item: Item) -> tuple[int, int]:
        """Latent frames x guidance halves whose K and V come to a layer from its left neighbour's last pass, and that it leaves
        for its right neighbour: what goes over the link to host memory when left caches wait there."""
        plan, halves = self.schedule.plan, self.halves_of(item)
        comes = plan.num_left(item.block) if item.left is Context.CACHE else 0
        goes = plan.num_left(item.block + 1) if item.keeps_tail else 0
        return comes * halves, goes * halves

    def window_tokens(self, item: Item) -> int:
        return query_and_key_frames(self.schedule, item)[0] * self.tokens_per_frame

    def own_tokens(self, item: Item) -> int:
        return self.schedule.plan.lengths[item.block] * self.tokens_per_frame

    def item_flops(self, item: Item) -> list[int]:
        """FLOPs of `item` on each stage; the first also embeds patches, the last has the output head."""
        if item.is_skipped:
            return [0] * len(self.layers)
        layer = self.layer_flops(item)
        flops = [layer * count for count in self.layers]
        flops[0] += self.embed_flops(item)
        flops[-1] += self.head_flops(item)
        return flops

    def total_flops(self) -> int:
        """FLOPs of the whole job over all stages."""
        return sum(sum(self.item_flops(item)) for item in self.schedule.items)

    def shape_of(self, item: Item) -> tuple[int, int, int, int]:
        """What the work of `item` depends on: frames of window and keys, own frames, guidance halves."""
        return (*query_and_key_frames(self.schedule, item), self.schedule.plan.lengths[item.block], self.halves_of(item))

    def cost(self, flops_per_s: float, *, overhead_s: float = 0.0) -> ItemCost:
        """Seconds of an item on a rank at `flops_per_s`, for `event_model.forecast`; `overhead_s` is added to each."""
        known: dict[tuple[int, int, int, int], list[float]] = {}

        def seconds(item: Item, rank: int) -> float:
            if item.is_skipped:
                return 0.0
            shape = self.shape_of(item)
            if shape not in known:
                known[shape] = [overhead_s + flops / flops_per_s for flops in self.item_flops(item)]
            return known[shape][rank]

        return seconds

    def forecast(self, flops_per_s: float, *, overhead_s: float = 0.0) -> Forecast:
        """When blocks would be denoised, in seconds, if every stage did `flops_per_s`."""
        return forecast(self.schedule, len(self.layers), self.cost(flops_per_s, overhead_s=overhead_s))
