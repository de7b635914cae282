"""`preview`, the cached left context and micro-batches: equal to the twin, same bits on any ranks, and what the model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.method.event_model import choose_preview, even_cost, forecast
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Context, Rules, Schedule, make_schedule
from tests.local_ring import denoise_in_threads
from tests.texts import as_said, joined, some_texts
from tests.twin import Twin

RULES = {
    "preview": Rules(left_context="own_step", max_in_flight=3, stagger=2),
    "preview, wide stagger": Rules(left_context="own_step", max_in_flight=2, stagger=4),
    "preview, one at a time": Rules(left_context="own_step", max_in_flight=1),
    "cached": Rules(context="cached"),
    "cached preview": Rules(left_context="own_step", max_in_flight=2, stagger=3, context="cached"),
    "guidance in the middle": Rules(guided_steps=(1, 4)),
    "guidance first, cached preview": Rules(left_context="own_step", max_in_flight=3, context="cached", guided_steps=(0, 3)),
}
PLANS = [(11, 3, 2), (10, 3, 3), (7, 4, 0), (13, 1, 1)]


def run_both(folder: Path, rules: Rules, plan: tuple[int, int, int], **ring: Any) -> tuple[torch.Tensor, torch.Tensor]:
    latents_num, num_per_block, num_cat = plan
    case: dict[str, Any] = {
        "latents_num": latents_num, "num_per_block": num_per_block, "num_cat": num_cat, "steps": 6, "texts": some_texts(),
        "boundary_ratio": 0.875 if "two" in folder.name else None,
    }  # fmt: skip
    expected = Twin(folder).run(**case, **as_said(rules))
    return joined(expected), joined(denoise_in_threads(folder, **case, rules=rules, **ring))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_twin(name: str, plan: tuple[int, int, int], tiny: Path, tiny_two: Path) -> None:
    for folder in (tiny, tiny_two):
        expected, found = run_both(folder, RULES[name], plan)
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", RULES)
def test_same_bits_on_any_ranks_and_halves_one_by_one(name: str, tiny_two: Path) -> None:
    rules = RULES[name]
    case: dict[str, Any] = {
        "latents_num": 11, "num_per_block": 3, "num_cat": 2, "steps": 5, "texts": some_texts(), "boundary_ratio": 0.875,
    }  # fmt: skip
    found = []
    for micro_batches in (False, True):
        chosen = replace(rules, micro_batches=micro_batches)
        found.append(joined(denoise_in_threads(tiny_two, **case, rules=chosen)))
        for ranks in (2, 3):
            again = denoise_in_threads(tiny_two, **case, rules=chosen, ranks=ranks, delay_seed=ranks)
            assert torch.equal(found[-1], joined(again))
    assert (found[0] - found[1]).abs().max() <= 1e-5


def test_steps_without_guidance_run_one_half_and_share_no_cache_with_the_others() -> None:
    schedule = schedule_of(Rules(guided_steps=(2, 5), micro_batches=True, context="cached"))
    assert [item.index for item in schedule.items] == list(range(len(schedule.items)))
    assert len(schedule.items) == 6 * (4 + 2 * 3)  # 7 steps of 6 blocks, three of them guided
    modes = {(item.block, item.step): item.is_guided for item in schedule.items}
    assert all(guided == (2 <= step < 5) for (_, step), guided in modes.items())
    for item in schedule.items:
        if item.right is Context.CACHE:
            assert modes[item.block + 1, item.step - 1] == item.is_guided
        if item.right is Context.LATENTS:
            assert modes[item.block + 1, item.step - 1] != item.is_guided


def schedule_of(rules: Rules, num_blocks: int = 6, steps: int = 7) -> Schedule:
    return make_schedule(rules, BlockPlan.of(4 * num_blocks + 2, 4, 2), (0,) * steps)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 9])
@pytest.mark.parametrize("stagger", [1, 2, 5, 50])
def test_preview_keeps_to_its_limits(max_in_flight: int, stagger: int) -> None:
    schedule = schedule_of(Rules(left_context="own_step", max_in_flight=max_in_flight, stagger=stagger))
    assert schedule.num_in_flight() <= max_in_flight
    step_of: dict[int, int] = {}
    for item in schedule.items:
        assert item.step == step_of.get(item.block, -1) + 1
        if item.step == 0 and item.block:
            assert step_of[item.block - 1] + 1 >= min(stagger, 7)
        if item.left_version is not None:
            assert item.left_version == item.step
        step_of[item.block] = item.step
    assert len(schedule.items) == 6 * 7


def test_cached_context_runs_no_context_frames_with_one_expert() -> None:
    schedule = schedule_of(Rules(context="cached"))
    assert all(schedule.window_frames(item) == (0, schedule.plan.lengths[item.block], 0) for item in schedule.items)
    for item in schedule.items:
        assert (item.left is Context.CACHE) == (item.block > 0)
    # Whatever is kept is used, and dropped once: at most one tail per block is alive.
    alive: set[int] = set()
    for item in schedule.items:
        if item.left is Context.CACHE:
            assert item.block - 1 in alive
            if item.frees_left:
                alive.remove(item.block - 1)
        if item.keeps_tail:
            assert item.block not in alive
            alive.add(item.block)
    assert not alive


def test_a_left_cache_of_the_other_expert_is_not_used() -> None:
    experts = (0, 0, 0, 1, 1, 1)
    schedule = make_schedule(
        Rules(left_context="own_step", max_in_flight=3, stagger=2, context="cached"), BlockPlan.of(22, 4, 2), experts
    )
    wrote: dict[int, int] = {}
    switched = 0
    for item in schedule.items:
        if item.left is Context.CACHE:
            assert wrote[item.block - 1] == item.expert
        elif item.block:
            assert wrote[item.block - 1] != item.expert
            switched += 1
        wrote[item.block] = item.expert
    assert switched


# METHOD.md's table: 50 steps, 64 blocks (5 in the last two rows), unit: one forward over all layers and both halves.
TABLE = [
    (4, 64, Rules(), 321.0, 803.8, 0.995),
    (4, 64, Rules(left_context="own_step", max_in_flight=3, stagger=16, micro_batches=True), 33.5, 816.4, 0.980),
    (8, 64, Rules(), 163.8, 407.9, 0.981),
    (8, 64, Rules(left_context="own_step", max_in_flight=5, stagger=10, micro_batches=True), 28.8, 419.6, 0.953),
    (8, 5, Rules(), 56.1, 60.1, 0.520),
    (8, 5, Rules(micro_batches=True), 34.2, 36.5, 0.856),
]


@pytest.mark.parametrize(("ranks", "num_blocks", "rules", "first", "total", "busy"), TABLE)
def test_the_event_model_says_what_the_method_says(
    ranks: int, num_blocks: int, rules: Rules, first: float, total: float, busy: float
) -> None:
    schedule = make_schedule(rules, BlockPlan.of(8 * num_blocks + 8, 8, 8), (0,) * 50)
    seen = forecast(schedule, ranks, even_cost(schedule, ranks))
    assert seen.first_block == pytest.approx(first, abs=0.06)
    assert seen.total == pytest.approx(total, abs=0.06)
    assert seen.busy[0] == pytest.approx(busy, abs=0.0006)


@pytest.mark.parametrize("ranks", [2, 4])
def test_preview_shows_its_first_block_far_earlier_for_nearly_the_same_total(ranks: int) -> None:
    plan, steps = BlockPlan.of(32 * 8 + 8, 8, 8), (0,) * 50
    paper = make_schedule(Rules(), plan, steps)
    rules = choose_preview(plan, steps, ranks, context="recomputed", has_guidance=True)
    chosen = make_schedule(rules, plan, steps)
    slow, soon = (forecast(schedule, ranks, even_cost(schedule, ranks)) for schedule in (paper, chosen))
    assert soon.first_block <= slow.first_block / 6
    assert soon.total <= 1.05 * slow.total
    assert chosen.num_in_flight() <= 2 * ranks + 2
