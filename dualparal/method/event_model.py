"""Event model: when each item of a schedule is worked on by each stage, given what it costs there.

The ring as the runtime runs it: stages take items in schedule order, rank 0 starts an item once the predictions it depends on
are back and at most `2 * ranks` items are under way. Of two rings each takes its half of a block step, at the same time.
A skipped item waits for its block alone and costs no stage anything. Times in the unit of the costs. No clock is read: the plan
command, the page's estimate, the choice of `preview`'s settings and the benchmarks all ask this model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Item, Rules, Schedule, make_schedule

MODELLED_BLOCKS = 48
MIN_IN_FLIGHT = 5  # of `preview`: with a wider gap than a fifth of the steps between neighbours seams show (docs/quality.md)

ItemCost = Callable[[Item, int], float]  # (item, rank) -> time of that stage


@dataclass(frozen=True)
class Forecast:
    """`block_done[b]`: when block b is denoised; `total`: when the last one is; `busy[r]`: share of it that rank r works."""

    block_done: tuple[float, ...]
    total: float
    busy: tuple[float, ...]
    step_done: Mapping[tuple[int, int], float] = field(default_factory=dict, repr=False)  # (block, steps done) -> when

    @property
    def first_block(self) -> float:
        return self.block_done[0]


def forecast(
    schedule: Schedule, ranks: int, cost: ItemCost, *, rings: int = 1, transfer: float = 0.0, step: float = 0.0
) -> Forecast:
    """Walk `schedule` over `rings` (`method.grid`) of `ranks` stages. `transfer`: time of one message between ranks; `step`: of
    one sampler step."""
    free = [0.0] * ranks * rings
    worked = [0.0] * ranks * rings
    returned: list[float] = []  # when the prediction of each item that made the trip is back and applied, in schedule order
    applied: dict[tuple[int, int], float] = {}  # (block, version) -> when rank 0 has it
    hops = [transfer if ranks > 1 else 0.0, transfer]
    for item in schedule.items:
        if rings > 1 and item.half == 1:  # it has left with the one before it
            continue
        needs = [applied.get((item.block, item.step), 0.0)]
        if item.left_version and item.block:  # a ghost is there from the start
            needs.append(applied[item.block - 1, item.left_version])
        if item.right_version:
            needs.append(applied[item.block + 1, item.right_version])
        if item.is_skipped:
            applied[item.block, item.step + 1] = needs[0] + step
            continue
        if len(returned) >= 2 * ranks:
            needs.append(returned[-2 * ranks])
        halves = [item, schedule.items[item.index + 1]] if rings > 1 and item.half == 0 else [item]
        begun = max(*needs, free[0])
        back = []
        for ring, half in enumerate(halves):
            at = begun + ring * transfer
            for rank in range(ring * ranks, (ring + 1) * ranks):
                start = max(at, free[rank])
                spent = cost(half, rank)
                free[rank] = start + spent
                worked[rank] += spent
                at = free[rank] + hops[ring]
            back.append(at)
        at = max(back)
        if halves[-1].is_whole:
            at += step
            applied[item.block, item.step + 1] = at
        returned.append(max(at, returned[-1]) if returned else at)
    done = tuple(applied[block, schedule.num_steps] for block in range(schedule.plan.num_blocks))
    total = max(done)
    return Forecast(done, total, tuple(seconds / total for seconds in worked), applied)


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
    plan: BlockPlan, experts: Sequence[int], ranks: int, *, context: str, has_guidance: bool, max_total: float = 1.05,
    rings: int = 1,
) -> Rules:  # fmt: skip
    """The `preview` rules that show the first block soonest with a total within `max_total` of `paper`'s.

    Tries more and more blocks in flight, with and without micro-batches (on two rings always with), from `MIN_IN_FLIGHT` on:
    the ranks may raise their number but never the gap in steps. Falls back to the shortest total when none is within the bound.
    Of a long video the first `MODELLED_BLOCKS` blocks are modelled: filling and draining weigh most in them, so the bound holds
    for the whole.
    """
    cuts = tuple(cut for cut in plan.cuts if cut < MODELLED_BLOCKS)
    shortened = BlockPlan(plan.lengths[:MODELLED_BLOCKS], plan.num_cat, cuts)
    return _choose_preview(shortened, tuple(experts), ranks, rings, context, has_guidance, max_total)


def even_stagger(num_steps: int, num_busy: int) -> int:
    """Steps between neighbours so that at least `num_busy` blocks are in flight, and never fewer than `MIN_IN_FLIGHT`."""
    return max(1, num_steps // max(MIN_IN_FLIGHT, num_busy))


@functools.lru_cache(maxsize=256)
def _choose_preview(
    plan: BlockPlan, experts: tuple[int, ...], ranks: int, rings: int, context: str, has_guidance: bool, max_total: float
) -> Rules:
    ways = (True,) if has_guidance and rings > 1 else (False, True) if has_guidance else (False,)
    paper = make_schedule(Rules(context=context, micro_batches=ways[0]), plan, experts)
    bound = max_total * forecast(paper, ranks, even_cost(paper, ranks), rings=rings).total
    most = max(MIN_IN_FLIGHT, min(plan.num_blocks, 2 * ranks + 2))
    staggers = sorted({even_stagger(len(experts), num_busy) for num_busy in range(MIN_IN_FLIGHT, most + 1)}, reverse=True)
    found: list[tuple[float, float, Rules]] = []
    for stagger in staggers:
        for micro_batches in ways:
            rules = Rules(
                max_in_flight=-(-len(experts) // stagger),
                stagger=stagger,
                left_context="own_step",
                context=context,
                micro_batches=micro_batches,
            )
            schedule = make_schedule(rules, plan, experts)
            seen = forecast(schedule, ranks, even_cost(schedule, ranks), rings=rings)
            found.append((seen.first_block, seen.total, rules))
        # More blocks at once only make the first one wait longer.
        if within := [entry for entry in found if entry[1] <= bound]:
            return min(within, key=lambda entry: entry[:2])[2]
    return min(found, key=lambda entry: entry[1])[2]
