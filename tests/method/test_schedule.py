"""Schedules as lists: every block step once and in order, and exactly the context that METHOD.md gives it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import ALL_BLOCKS, Context, LeftContext, Rules, Schedule, make_schedule


def experts_of(steps: int, switch: int) -> tuple[int, ...]:
    return tuple(int(step >= switch) for step in range(steps))


def check(schedule: Schedule, rules: Rules, plan: BlockPlan, experts: Sequence[int]) -> None:
    """Walk the list with a simulation of its own."""
    items, steps = schedule.items, len(experts)
    assert [item.index for item in items] == list(range(len(items)))
    done = [0] * plan.num_blocks  # steps done, now
    before = [0] * plan.num_blocks  # ... as the present sweep found them
    sweep = -1
    previous = None
    for item in items:
        if item.sweep != sweep:
            assert item.sweep == sweep + 1
            sweep, before, previous = item.sweep, list(done), None
        assert item.step == done[item.block], "a block's steps come in order"
        assert item.expert == experts[item.step]
        if previous is not None:
            assert item.block == previous.block - 1, "newest first, neighbours next to each other"

        # Left: the latest latents of the block before, as the sweep found them.
        has_left = item.block > 0 and plan.num_cat > 0
        assert (item.left is not Context.NONE) == has_left
        if item.left is Context.LATENTS:
            version = before[item.block - 1] if rules.left_context == "latest" else item.step
            assert item.left_version == version
            assert 0 <= item.left_version <= before[item.block - 1], "a version that does not exist yet"
            assert item.left_version > item.step or rules.left_context == "own_step" or before[item.block - 1] == steps
        else:
            assert item.left_version is None

        # Right: what the item just before left, if it is the next block of this sweep on the same expert.
        ran_before = previous is not None and plan.num_cat > 0
        if not ran_before:
            assert item.right is Context.NONE
        elif previous.expert == item.expert:  # type: ignore[union-attr]
            assert item.right is Context.CACHE
            assert previous.keeps_head  # type: ignore[union-attr]
        else:
            assert item.right is Context.LATENTS
            assert item.right_version == before[item.block + 1]
            assert not previous.keeps_head  # type: ignore[union-attr]
        if item.keeps_head:
            following = items[item.index + 1]
            assert following.right is Context.CACHE and following.block == item.block - 1, "kept for nobody"
        done[item.block] += 1
        previous = item
    assert done == [steps] * plan.num_blocks
    for uses, name in ((schedule.last_left_use, "left"), (schedule.last_right_use, "right")):
        for (block, version), index in uses.items():
            users = [i for i in items if getattr(i, f"{name}_version") == version and abs(i.block - block) == 1]
            assert index == max(i.index for i in users if i.block == block + (1 if name == "left" else -1))


@pytest.mark.parametrize("switch", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("num_cat", [0, 1, 3])
@pytest.mark.parametrize("latents_num", [1, 4, 7, 20, 31])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_paper(latents_num: int, num_cat: int, steps: int, switch: int) -> None:
    plan, experts, rules = BlockPlan.of(latents_num, 3, num_cat), experts_of(steps, switch), Rules()
    schedule = make_schedule(rules, plan, experts)
    check(schedule, rules, plan, experts)
    expected = [
        (block, sweep - block)
        for sweep in range(plan.num_blocks + steps - 1)
        for block in reversed(range(plan.num_blocks))
        if 0 <= sweep - block < steps
    ]
    assert [(item.block, item.step) for item in schedule.items] == expected
    assert schedule.num_in_flight() == min(plan.num_blocks, steps)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    latents_num=st.integers(1, 40), num_per_block=st.integers(1, 5), share=st.floats(0, 1), steps=st.integers(1, 12),
    switch=st.integers(0, 13),
    left_context=st.sampled_from(["latest", "own_step"]), context=st.sampled_from(["recomputed", "cached"]),
    max_in_flight=st.integers(1, 6) | st.just(ALL_BLOCKS), stagger=st.integers(1, 14),
)  # fmt: skip
def test_any_rules(
    latents_num: int, num_per_block: int, share: float, steps: int, switch: int, left_context: LeftContext, context: str,
    max_in_flight: int, stagger: int,
) -> None:  # fmt: skip
    rules = Rules(left_context=left_context, context=context, max_in_flight=max_in_flight, stagger=stagger)
    plan, experts = BlockPlan.of(latents_num, num_per_block, round(share * num_per_block)), experts_of(steps, switch)
    schedule = make_schedule(rules, plan, experts)
    check(schedule, rules, plan, experts)
    assert schedule.num_in_flight() <= max_in_flight
    halves = make_schedule(Rules(**{**vars(rules), "micro_batches": True}), plan, experts)
    assert [(item.block, item.step, item.half) for item in halves.items] == [
        (item.block, item.step, half) for item in schedule.items for half in (0, 1)
    ]
    assert [item.index for item in halves.items] == list(range(2 * len(schedule.items)))


def test_it_is_a_pure_function() -> None:
    plan, experts = BlockPlan.of(31, 3, 2), experts_of(8, 3)
    assert make_schedule(Rules(), plan, experts).items == make_schedule(Rules(), plan, experts).items


@pytest.mark.parametrize("values", [{"left_context": "fast"}, {"context": "none"}, {"max_in_flight": 0}, {"stagger": 0}])
def test_unknown_rules(values: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        Rules(**values)  # type: ignore[arg-type]
