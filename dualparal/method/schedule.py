"""Schedules: the order of all block steps, and what each of them sees (METHOD.md, "Schedules").

A schedule is a pure function from (block plan, expert of each step, rules) to a list of `Item`s. Every rank computes the same
list and walks it; nothing on the wire repeats what it says. Messages, progress, cancel points, resume points, memory and
estimates all follow from it. No clock, no rank, no arrival order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from dualparal.errors import RequestError
from dualparal.method.grid import Ring
from dualparal.method.plan import BlockPlan
from dualparal.method.step_cache import StepCache
from dualparal.request import LeftContext

ALL_BLOCKS = sys.maxsize  # in flight: no limit
Mode = tuple[int, bool]  # expert, whether guided: K/V and predictions of one mode do not serve another


class Context(Enum):
    """Where a block step finds the context of one side."""

    NONE = "none"  # no neighbour there (yet), or num_cat = 0
    CACHE = "cache"  # K/V that a pass of the neighbour left on each stage
    LATENTS = "latents"  # the neighbour's latents join the window and run through the layers


@dataclass(frozen=True, slots=True)
class Item:
    """One trip through all layers: `block` makes its denoising step `step` (0 = noisiest).

    `is_skipped`: no trip at all; rank 0 extrapolates the prediction, the other ranks pass over the item.
    `half`: which guidance half, 0 or 1, when they go as two micro-batches; None when both go together. `expert` runs it.
    `is_guided`: whether this step has an unconditional half, where the request has guidance at all.
    `left_version`, `right_version`: for `Context.LATENTS`, how many steps the neighbour's latents have done. `keeps_head`,
    `keeps_tail`: this pass leaves K/V of its first (last) `num_cat` own latents for block - 1 (block + 1). `frees_left`: no
    later item uses the left cache that this one uses. `sweep` counts from 0.
    """

    index: int
    sweep: int
    block: int
    step: int
    expert: int
    left: Context = Context.NONE
    left_version: int | None = None
    right: Context = Context.NONE
    right_version: int | None = None
    keeps_head: bool = False
    keeps_tail: bool = False
    frees_left: bool = False
    half: int | None = None
    is_guided: bool = True
    is_skipped: bool = False

    @property
    def mode(self) -> Mode:
        """Expert, and whether guided."""
        return self.expert, self.is_guided

    @property
    def is_whole(self) -> bool:
        """Whether the block's step is complete after this item: both halves, or the second of them."""
        return self.half != 0

    def is_on(self, ring: Ring) -> bool:
        """Whether it takes that ring, where it makes the trip: of two, the second half takes ring 1 and all else ring 0."""
        return ring is None or (self.half == 1) == (ring == 1)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a schedule follows, all of it fixed when a job is submitted; the defaults are the paper's.

    `max_in_flight` blocks at most are denoised at once, each at least `stagger` steps ahead of the next. `left_context`: which
    of the left neighbour's latents a window begins with, the "latest" or those at the block's "own_step". `context`:
    "recomputed" (the left neighbour's latents run through the layers again) or "cached" (its K/V of its last pass are kept).
    `micro_batches`: guidance halves travel one by one. `guided_steps`: first and end of the steps that guidance is applied in;
    None for all. `step_cache`: which steps are skipped; None for none. `refresh`: of "cached", after so many sweeps that skip
    nothing one recomputes all left context, so that nothing from before it is needed; 0 for never.
    """

    max_in_flight: int = ALL_BLOCKS
    stagger: int = 1
    left_context: LeftContext = "latest"
    context: str = "recomputed"
    micro_batches: bool = False
    guided_steps: tuple[int, int] | None = None
    step_cache: StepCache | None = None
    refresh: int = 0

    def is_guided(self, step: int) -> bool:
        """Whether guidance is applied at that step."""
        return self.guided_steps is None or self.guided_steps[0] <= step < self.guided_steps[1]

    def __post_init__(self) -> None:
        if self.left_context not in ("latest", "own_step"):
            raise RequestError(f"left_context={self.left_context!r} is not known; use latest or own_step", "left_context")
        if self.context not in ("recomputed", "cached"):
            raise RequestError(f"context={self.context!r} is not known; use recomputed or cached", "context")
        if self.max_in_flight < 1 or self.stagger < 1:
            raise RequestError("max_in_flight and stagger must be at least 1", "stagger")
        if self.refresh < 0:
            raise RequestError(f"refresh={self.refresh} is not a number of passes; use 0 (never) or more", "refresh")


@dataclass(frozen=True)
class Schedule:
    """All items of one job, in order, with the plan they follow.

    `max_order`: of the extrapolation of skipped steps; None when none is skipped.
    """

    plan: BlockPlan
    num_steps: int
    items: tuple[Item, ...]
    max_order: int | None = None

    @cached_property
    def last_left_use(self) -> dict[tuple[int, int], int]:
        """Index of the last item that takes the tail of (block, version) into its window."""
        return {(item.block - 1, item.left_version): item.index for item in self.items if item.left_version is not None}

    @cached_property
    def last_right_use(self) -> dict[tuple[int, int], int]:
        """Index of the last item that takes the head of (block, version) into its window."""
        return {(item.block + 1, item.right_version): item.index for item in self.items if item.right_version is not None}

    def window_frames(self, item: Item) -> tuple[int, int, int]:
        """Latent frames that `item` runs through the layers: (left context, own, right context); none when it is skipped."""
        if item.is_skipped:
            return 0, 0, 0
        left = self.plan.num_left(item.block) if item.left is Context.LATENTS else 0
        right = self.plan.num_right(item.block) if item.right is Context.LATENTS else 0
        return left, self.plan.lengths[item.block], right

    def on_ring(self, ring: Ring, start: int = 0) -> list[Item]:
        """The items from `start` on that make the trip along that ring, in order."""
        return [item for item in self.items[start:] if not item.is_skipped and item.is_on(ring)]

    def last_on_ring(self, ring: Ring) -> dict[int, int]:
        """Index of each block's last item on that ring."""
        return {item.block: item.index for item in self.on_ring(ring)}

    def num_in_flight(self) -> int:
        """Most blocks that are in flight at once."""
        per_sweep: dict[int, set[int]] = {}
        for item in self.items:
            per_sweep.setdefault(item.sweep, set()).add(item.block)
        return max(len(blocks) for blocks in per_sweep.values())


def _sweeps(rules: Rules, num_blocks: int, num_steps: int) -> Iterator[list[tuple[int, int]]]:
    """The (block, step) pairs of each sweep, newest (noisiest) block first; every block in flight advances by one step.

    A block enters when its left neighbour is `stagger` steps ahead and fewer than `max_in_flight` are in flight.
    """
    done = [0] * num_blocks
    first = entered = 0  # blocks first ... entered - 1 are in flight
    while first < num_blocks:
        is_far_enough = entered == 0 or done[entered - 1] >= min(rules.stagger, num_steps)
        if entered < num_blocks and entered - first < rules.max_in_flight and is_far_enough:
            entered += 1
        yield [(block, done[block]) for block in range(entered - 1, first - 1, -1)]
        for block in range(first, entered):
            done[block] += 1
        while first < entered and done[first] == num_steps:
            first += 1


def make_schedule(rules: Rules, plan: BlockPlan, experts: Sequence[int]) -> Schedule:
    """The list of items for `plan` under `rules`; `experts[s]` is the expert that runs step s (all 0 with one).

    Left context of block b, recomputed: block b - 1's latents, the latest (after its step of the sweep before, or final once it
    has left) or those at b's own step. Cached: K/V of block b - 1's most recent pass, unless another mode made it or a refresh
    has come since. Block 0 sees a ghost at its own step, always as latents. Right context: block b + 1 as this sweep has just
    run it: its K/V, or its latents where it ran in another mode or skipped the step. A step's mode is its expert and whether it
    is guided: K/V of one mode do not serve the other.
    """
    num_steps = len(experts)
    modes = [(expert, rules.is_guided(step)) for step, expert in enumerate(experts)]
    cache, num_before = rules.step_cache, _num_before(modes)
    items: list[Item] = []
    done = [0] * plan.num_blocks  # steps that each block has done before the present sweep
    passed: dict[int, Mode] = {}  # mode of each block's most recent pass, of those whose K/V may still be used
    since_refresh = 0  # sweeps that skipped nothing
    for sweep, steps in enumerate(_sweeps(rules, plan.num_blocks, num_steps)):
        running: dict[int, Mode | None] = {}  # mode of each block in flight, None when it skips this sweep
        for block, step in steps:
            is_skipped = cache is not None and cache.is_skipped(sweep, step, num_before[step], num_steps)
            running[block] = None if is_skipped else modes[step]
        if None not in running.values():
            if _is_refresh(rules.refresh, since_refresh, steps[-1], num_steps, plan):
                passed, since_refresh = {}, 0
            since_refresh += 1
        for block, step in steps:
            expert, is_guided = modes[step]
            item = Item(len(items), sweep, block, step, expert, is_guided=is_guided, is_skipped=running[block] is None)
            if plan.num_cat and not item.is_skipped:
                item = _with_left(item, plan, rules, passed, done)
                item = _with_right(item, plan, running, done)
            items.append(item)
        for block, step in steps:
            done[block] = step + 1
        passed |= {block: mode for block, mode in running.items() if mode is not None}
    assert len(items) == plan.num_blocks * num_steps
    items = _with_left_caches(items)
    if rules.micro_batches:
        items = [replace(half, index=i) for i, half in enumerate(half for item in items for half in _halves(item))]
    max_order = cache.max_order if cache is not None and any(item.is_skipped for item in items) else None
    return Schedule(plan, num_steps, tuple(items), max_order)


def _is_refresh(refresh: int, since: int, oldest: tuple[int, int], num_steps: int, plan: BlockPlan) -> bool:
    """Whether a sweep that skips nothing, `since` such after the last refresh, forgets the K/V of all passes before it.

    It waits for a sweep in which the `oldest` (block, step) in flight is at its last step or has no left neighbour: a block
    that outlives its left neighbour would have to recompute to its end. Where step caching lets none come, not for ever.
    """
    block, step = oldest
    loses_none = plan.begins_scene(block) or step + 1 == num_steps
    return 0 < refresh <= since and (loses_none or since >= refresh + num_steps)


def _num_before(modes: Sequence[Mode]) -> list[int]:
    """How many steps have been done in each step's mode, without a break, before it."""
    found: list[int] = []
    for step, mode in enumerate(modes):
        found.append(found[-1] + 1 if step and modes[step - 1] == mode else 0)
    return found


def _with_left(item: Item, plan: BlockPlan, rules: Rules, passed: Mapping[int, Mode], done: Sequence[int]) -> Item:
    if item.block == 0 and plan.ghost:
        return replace(item, left=Context.LATENTS, left_version=item.step)
    if plan.begins_scene(item.block):
        return item
    if rules.context == "cached" and passed.get(item.block - 1) == item.mode:
        return replace(item, left=Context.CACHE)
    version = done[item.block - 1] if rules.left_context == "latest" else item.step
    return replace(item, left=Context.LATENTS, left_version=version)


def _with_right(item: Item, plan: BlockPlan, running: Mapping[int, Mode | None], done: Sequence[int]) -> Item:
    if not plan.begins_scene(item.block):
        item = replace(item, keeps_head=running.get(item.block - 1) == item.mode)
    if item.block + 1 not in running or plan.begins_scene(item.block + 1):
        return item
    if running[item.block + 1] == item.mode:
        return replace(item, right=Context.CACHE)
    return replace(item, right=Context.LATENTS, right_version=done[item.block + 1])


def _with_left_caches(items: list[Item]) -> list[Item]:
    """Mark the passes whose tail K/V some later item uses, and the last of those items."""
    found = list(items)
    latest: dict[int, int] = {}  # index of each block's most recent pass
    last_use: dict[int, int] = {}  # pass -> last item that uses its tail
    for item in items:
        if item.left is Context.CACHE:
            last_use[latest[item.block - 1]] = item.index
        if not item.is_skipped:
            latest[item.block] = item.index
    for source, user in last_use.items():
        found[source] = replace(found[source], keeps_tail=True)
        found[user] = replace(found[user], frees_left=True)
    return found


def _halves(item: Item) -> tuple[Item, ...]:
    return (replace(item, half=0), replace(item, half=1)) if item.is_guided and not item.is_skipped else (item,)
