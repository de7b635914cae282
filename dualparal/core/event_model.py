"""Event model: when each item of a schedule is worked on by each stage, given what it costs there.

The ring as the runtime runs it: stages take items in schedule order, rank 0 starts an item once the predictions it depends on
are back and at most `2 * ranks` items are under way. A skipped item waits for its block alone and costs no stage anything.
Times in the unit of the costs. No clock is read: the plan command, the page's estimate, the choice of `preview`'s settings and
the benchmarks all ask this model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualparal.core.plan import BlockPlan
from dualparal.core.schedule import Context, Item, Rules, Schedule, make_schedule

MODELLED_BLOCKS = 48

ItemCost = Callable[[Item, int], float]  # (item, rank) -> time of that stage


@dataclass(frozen=True)
class Forecast:
    """`block_done[b]`: when block b is denoised; `total`: when the last one is; `busy[r]`: share of it that stage r works."""

    block_done: tuple[float, ...]
    total: float
    busy: tuple[float, ...]

    @property
    def first_block(self) -> float:
        return self.block_done[0]


def forecast(schedule: Schedule, ranks: int, cost: ItemCost, *, transfer: float = 0.0, step: float = 0.0) -> Forecast:
    """Walk `schedule` over `ranks` stages. `transfer`: time of one message between ranks; `step`: of one sampler step."""
    free = [0.0] * ranks
    worked = [0.0] * ranks
    returned: list[float] = []  # when the prediction of each item that made the trip is back and applied, in schedule order
    applied: dict[tuple[int, int], float] = {}  # (block, version) -> when rank 0 has it
    hop = transfer if ranks > 1 else 0.0
    for item in schedule.items:
        needs = [applied.get((item.block, item.step), 0.0)]
        if item.left_version:
            needs.append(applied[item.block - 1, item.left_version])
        if item.right_version:
            needs.append(applied[item.block + 1, item.right_version])
        if item.is_skipped:
            applied[item.block, item.step + 1] = needs[0] + step
            continue
        if len(returned) >= 2 * ranks:
            needs.append(returned[-2 * ranks])
        at = max(needs)
        for rank in range(ranks):
            start = max(at, free[rank])
            spent = cost(item, rank)
            free[rank] = start + spent
            worked[rank] += spent
            at = free[rank] + hop
        if item.is_whole:
            at += step
            applied[item.block, item.step + 1] = at
        returned.append(max(at, returned[-1]) if returned else at)
    done = tuple(applied[block, schedule.num_steps] for block in range(schedule.plan.num_blocks))
    total = max(done)
    return Forecast(done, total, tuple(seconds / total for seconds in worked))


def even_cost(schedule: Schedule, ranks: int) -> ItemCost:
    """Costs in forwards of one ordinary block (own frames and left context) over all layers, split evenly over the ranks.

    Linear layers cost by query frames; attention is small beside them for these windows and is left out.
    """
    plan = schedule.plan
    ordinary = max(plan.num_left(block) + plan.lengths[block] for block in range(plan.num_blocks))

    def cost(item: Item, rank: int) -> float:
        share = sum(schedule.window_frames(item)) / ordinary
        return share / ranks / (1 if item.half is None and item.is_guided else 2)

    return cost


def choose_preview(
    plan: BlockPlan, experts: Sequence[int], ranks: int, *, context: str, has_guidance: bool, max_total: float = 1.05
) -> Rules:
    """The `preview` rules that show the first block soonest with a total within `max_total` of `paper`'s.

    Tries more and more blocks in flight, evenly staggered, with and without micro-batches; few mean little memory. Falls
    back to the shortest total when none is within the bound. Of a long video the first `MODELLED_BLOCKS` blocks are
    modelled: filling and draining weigh most in them, so the bound holds for the whole.
    """
    shortened = BlockPlan(plan.lengths[:MODELLED_BLOCKS], plan.num_cat)
    return _choose_preview(shortened, tuple(experts), ranks, context, has_guidance, max_total)


@functools.lru_cache(maxsize=256)
def _choose_preview(
    plan: BlockPlan, experts: tuple[int, ...], ranks: int, context: str, has_guidance: bool, max_total: float
) -> Rules:
    paper = make_schedule(Rules(context=context), plan, experts)
    bound = max_total * forecast(paper, ranks, even_cost(paper, ranks)).total
    most = min(plan.num_blocks, 2 * ranks + 2, len(experts))
    found: list[tuple[float, float, Rules]] = []
    for max_in_flight in range(min(2, most), most + 1):
        for micro_batches in (False, True)[: 2 if has_guidance else 1]:
            stagger = max(1, -(-len(experts) // max_in_flight))
            rules = Rules(
                policy="preview", context=context, max_in_flight=max_in_flight, stagger=stagger, micro_batches=micro_batches
            )
            schedule = make_schedule(rules, plan, experts)
            seen = forecast(schedule, ranks, even_cost(schedule, ranks))
            found.append((seen.first_block, seen.total, rules))
        # More blocks at once only make the first one wait longer.
        if within := [entry for entry in found if entry[1] <= bound]:
            return min(within, key=lambda entry: entry[:2])[2]
    return min(found, key=lambda entry: entry[1])[2]


def num_recomputed(schedule: Schedule) -> int:
    """Context frames that run through the layers again, summed over all items: what `context="cached"` saves."""
    return sum(
        sum(schedule.window_frames(item)) - schedule.plan.lengths[item.block]
        for item in schedule.items
        if item.left is Context.LATENTS or item.right is Context.LATENTS
    )
