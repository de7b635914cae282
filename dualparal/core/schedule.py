"""Schedules: the order of all block steps, and what each of them sees (METHOD.md, "Schedules").

A schedule is a pure function from (block plan, expert of each step) to a list of `Item`s. Every rank computes the same list
and walks it; nothing on the wire repeats what it says. Messages, progress, cancel points, memory and estimates all follow
from it. No clock, no rank, no arrival order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from dualparal.core.plan import BlockPlan
from dualparal.errors import RequestError


class Right(Enum):
    """Where a block step finds its right context."""

    NONE = "none"  # no right neighbour in flight, or num_cat = 0
    CACHE = "cache"  # K/V that the forward pass just before left on each stage
    LATENTS = "latents"  # the other expert ran block + 1: its first latents join the window


@dataclass(frozen=True, slots=True)
class Item:
    """One block step: `block` goes through all layers to make its denoising step `step` (0 = noisiest).

    `left_version`: how many steps block - 1's latents have done in the version used as left context; None without one.
    `right_version`: for `Right.LATENTS`, how many steps block + 1's latents have done.
    `keeps`: this step leaves K/V of its first `num_cat` latents for the next item. `expert` runs it. `sweep` counts from 0.
    """

    index: int
    sweep: int
    block: int
    step: int
    expert: int
    left_version: int | None
    right: Right
    right_version: int | None
    keeps: bool


@dataclass(frozen=True)
class Schedule:
    """All block steps of one job, in order, with the plan they follow."""

    plan: BlockPlan
    num_steps: int
    items: tuple[Item, ...]

    @cached_property
    def last_left_use(self) -> dict[tuple[int, int], int]:
        """Index of the last item that uses the tail of (block, version) as left context."""
        return {(item.block - 1, item.left_version): item.index for item in self.items if item.left_version is not None}

    @cached_property
    def last_right_use(self) -> dict[tuple[int, int], int]:
        """Index of the last item that takes the head of (block, version) into its window."""
        return {(item.block + 1, item.right_version): item.index for item in self.items if item.right_version is not None}

    def num_in_flight(self) -> int:
        """Most blocks that are in flight at once."""
        first = {item.block: item.index for item in reversed(self.items)}
        last = {item.block: item.index for item in self.items}
        changes = sorted([(index, 1) for index in first.values()] + [(index + 1, -1) for index in last.values()])
        most = count = 0
        for _, change in changes:
            count += change
            most = max(most, count)
        return most


def _paper_sweeps(num_blocks: int, num_steps: int) -> Iterator[list[tuple[int, int]]]:
    """One new block per sweep, no limit; block b is at step sweep - b; newest (noisiest) first."""
    for sweep in range(num_blocks + num_steps - 1):
        newest, oldest = min(sweep, num_blocks - 1), max(0, sweep - num_steps + 1)
        yield [(block, sweep - block) for block in range(newest, oldest - 1, -1)]


SWEEPS: dict[str, Callable[[int, int], Iterator[list[tuple[int, int]]]]] = {"paper": _paper_sweeps}


def make_schedule(policy: str, plan: BlockPlan, experts: Sequence[int]) -> Schedule:
    """The list of block steps of `policy` for `plan`; `experts[s]` is the expert that runs step s (all 0 with one).

    Left context of block b is block b - 1's latest latents: after its step of the sweep before, or its final ones once
    it has left. The right context is block b + 1 as this sweep has just run it.
    """
    if policy not in SWEEPS:
        raise RequestError(f"schedule={policy!r} is not known; use one of {', '.join(SWEEPS)}", "schedule")
    num_steps = len(experts)
    items: list[Item] = []
    done = [0] * plan.num_blocks  # steps that each block has done before the present sweep
    for sweep, steps in enumerate(SWEEPS[policy](plan.num_blocks, num_steps)):
        running = dict(steps)
        for block, step in steps:
            expert = experts[step]
            right = Right.NONE
            if plan.num_cat and block + 1 in running:
                right = Right.CACHE if experts[running[block + 1]] == expert else Right.LATENTS
            items.append(
                Item(
                    index=len(items),
                    sweep=sweep,
                    block=block,
                    step=step,
                    expert=expert,
                    left_version=done[block - 1] if block and plan.num_cat else None,
                    right=right,
                    right_version=running[block + 1] if right is Right.LATENTS else None,
                    keeps=plan.num_cat > 0 and block - 1 in running and experts[running[block - 1]] == expert,
                )
            )
        for block, step in steps:
            done[block] = step + 1
    assert len(items) == plan.num_blocks * num_steps
    return Schedule(plan, num_steps, tuple(items))
