"""Where a job's state can be saved, and what rank 0 holds there: said once, for who saves it and for who makes room for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dualparal.method.schedule import Item, Schedule

T = TypeVar("T")


def tensors_of_block(num_done: int, max_order: int | None) -> int:
    """Tensors as large as itself that a block in flight consists of at most after `num_done` steps: latents, UniPC's last
    sample and two past predictions, and where steps are skipped (`Schedule.max_order`) what they are extrapolated from."""
    return 2 + min(num_done, 2) + (0 if max_order is None else min(num_done, max_order + 1))


@dataclass(frozen=True)
class Border:
    """A sweep's end where the state can be saved: `num_done` block steps are done, item `next_index` comes next, `last` was the
    last one that made the trip."""

    num_done: int
    next_index: int
    last: Item


def borders(schedule: Schedule) -> Iterator[Border]:
    """Every border of `schedule`, in order: all that is to come follows from what rank 0 holds there.

    Predictions are applied in schedule order, but skipped steps as soon as their block is there. So after the last step of a
    sweep every block is at the border if the next sweep skips nothing: its predictions come back behind all that are awaited.
    K/V that stages keep from sweep to sweep are never saved: no border has any that is used after it.
    """
    skipping = {item.sweep for item in schedule.items if item.is_skipped}
    num_done, num_kept, last = 0, 0, schedule.items[0]
    for item, after in itertools.pairwise(schedule.items):
        num_done += item.is_whole
        num_kept += item.keeps_tail - item.frees_left
        last = last if item.is_skipped else item
        if item.sweep != after.sweep and after.sweep not in skipping and not num_kept:
            yield Border(num_done, after.index, last)


def rest_border(schedule: Schedule, num_steps: int) -> Border | None:
    """Where a take rests: the first border after which the first block has done `num_steps` steps or more. None where there is
    none, or `num_steps` is 0."""
    if num_steps <= 0:
        return None
    return next((border for border in borders(schedule) if border.last.sweep + 1 >= num_steps), None)


class Ends(Generic[T]):
    """The ends of blocks that later items of a schedule will see, by (block, steps it had done); what an end is, is the
    caller's affair, and so is a ghost."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.tails: dict[tuple[int, int], T] = {}
        self.heads: dict[tuple[int, int], T] = {}

    def follow(self, schedule: Schedule, tails: dict[tuple[int, int], T], heads: dict[tuple[int, int], T]) -> None:
        """Go on by `schedule` with these ends. They may be those of another that agreed with it so far: what no item will see
        of them is dropped."""
        self._schedule = schedule
        self.tails = {key: end for key, end in tails.items() if key in schedule.last_left_use}
        self.heads = {key: end for key, end in heads.items() if key in schedule.last_right_use}

    def record(self, block: int, version: int, cut: Callable[[slice], T]) -> None:
        """Keep what later items will see of `block` at this version; `cut` cuts it from the block's latent frames."""
        plan, key = self._schedule.plan, (block, version)
        if key in self._schedule.last_left_use:
            length = plan.lengths[block]
            self.tails[key] = cut(slice(max(0, length - plan.num_cat), length))
        if key in self._schedule.last_right_use:
            self.heads[key] = cut(slice(0, plan.num_kept(block)))

    def release(self, item: Item) -> None:
        """Drop what no item after `item` will see. Once it is done, not when it was sent: a border saved meanwhile needs it."""
        for ends, uses, neighbour, version in (
            (self.tails, self._schedule.last_left_use, item.block - 1, item.left_version),
            (self.heads, self._schedule.last_right_use, item.block + 1, item.right_version),
        ):
            if version is not None and neighbour >= 0 and uses[neighbour, version] <= item.index:
                del ends[neighbour, version]


def most_saved_frames(schedule: Schedule) -> int:
    """Latent frames, over all its tensors, of the most that a border may hold: what is there after the fullest sweep, where
    there are borders at all."""
    if next(borders(schedule), None) is None:
        return 0
    plan, ends = schedule.plan, Ends[int](schedule)
    in_flight: dict[int, int] = {}  # steps done
    most = 0
    for item, after in itertools.pairwise(schedule.items):
        block = item.block
        if block not in in_flight:
            in_flight[block] = 0
            ends.record(block, 0, _length)
        if item.is_whole:
            ends.record(block, item.step + 1, _length)
            ends.release(item)
            in_flight[block] = item.step + 1
            if in_flight[block] == schedule.num_steps:
                del in_flight[block]
        if item.sweep != after.sweep:
            whole = sum(plan.lengths[b] * tensors_of_block(done, schedule.max_order) for b, done in in_flight.items())
            most = max(most, whole + sum(ends.tails.values()) + sum(ends.heads.values()))
    return most


def _length(frames: slice) -> int:
    return int(frames.stop - frames.start)
