"""Schedules with step caching: which steps are skipped, what the others see, and what progress makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.events import Progress
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import ALL_BLOCKS, Context, Item, LeftContext, Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.ring.progress import ProgressReport


@pytest.mark.parametrize(("interval", "before", "after", "computed"), [
    (5, 3, None, [0, 1, 2, 4, 9, 14, 19]),
    (6, 2, None, [0, 1, 3, 9, 15, 19]),
    (2, 3, 19, [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19]),
    (4, 1, 17, [0, 2, 6, 10, 14, 17, 18, 19]),
])  # fmt: skip
def test_one_block_follows_diffusers_pattern(interval: int, before: int, after: int | None, computed: list[int]) -> None:
    cache = StepCache(interval=interval, before=before, after=after)
    items = make_schedule(Rules(step_cache=cache), BlockPlan.of(4, 4, 2), (0,) * 20).items
    assert [item.step for item in items if not item.is_skipped] == computed
    # As TaylorSeerCacheHook has it, and the last step.
    assert computed == [
        step for step in range(20)
        if step < before or (step - before - 1) % interval == 0 or (after is not None and step >= after) or step == 19
    ]  # fmt: skip


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    latents_num=st.integers(1, 30), num_per_block=st.integers(1, 4), share=st.floats(0, 1), steps=st.integers(1, 14),
    switch=st.integers(0, 15),
    left_context=st.sampled_from(["latest", "own_step"]), context=st.sampled_from(["recomputed", "cached"]),
    stagger=st.integers(1, 14),
    max_in_flight=st.integers(1, 6) | st.just(ALL_BLOCKS), interval=st.integers(1, 6), before=st.integers(1, 5),
    cool_down=st.none() | st.integers(0, 5), micro_batches=st.booleans(),
    guided=st.none() | st.tuples(st.integers(0, 6), st.integers(0, 14)),
)  # fmt: skip
def test_any_rules(
    latents_num: int, num_per_block: int, share: float, steps: int, switch: int, left_context: LeftContext, context: str,
    max_in_flight: int, stagger: int, interval: int, before: int,
    cool_down: int | None, micro_batches: bool, guided: tuple[int, int] | None,
) -> None:  # fmt: skip
    cache = StepCache(interval=interval, before=before, after=None if cool_down is None else max(0, steps - cool_down))
    rules = Rules(
        left_context=left_context, context=context, max_in_flight=max_in_flight, stagger=stagger, micro_batches=micro_batches,
        guided_steps=guided, step_cache=cache,
    )  # fmt: skip
    plan = BlockPlan.of(latents_num, num_per_block, round(share * num_per_block))
    experts = tuple(int(step >= switch) for step in range(steps))
    schedule, computed = make_schedule(rules, plan, experts), make_schedule(replace(rules, step_cache=None), plan, experts)
    whole = [item for item in schedule.items if item.is_whole]
    assert [(i.sweep, i.block, i.step, i.mode) for i in whole] == [
        (i.sweep, i.block, i.step, i.mode) for i in computed.items if i.is_whole
    ], "the same steps in the same order, computed or not"
    assert [item.index for item in schedule.items] == list(range(len(schedule.items)))
    assert (schedule.max_order is None) == (not any(item.is_skipped for item in schedule.items))
    if interval == 1:
        assert schedule.items == computed.items
    check_skipped(whole, plan, cache, steps)
    check_contexts(whole, plan, rules)
    for item in schedule.items:
        if item.is_skipped:
            assert (item.half, item.left, item.right, item.keeps_head, item.keeps_tail) == (
                None, Context.NONE, Context.NONE, False, False
            )  # fmt: skip
            assert schedule.window_frames(item) == (0, 0, 0)


def check_skipped(whole: list[Item], plan: BlockPlan, cache: StepCache, steps: int) -> None:
    end = steps - 1 if cache.after is None else min(cache.after, steps - 1)
    for block in range(plan.num_blocks):
        own = [item for item in whole if item.block == block]
        gap, num_in_mode = 0, 0
        for number, item in enumerate(own):
            num_in_mode = num_in_mode + 1 if number and own[number - 1].mode == item.mode else 0
            if num_in_mode < cache.before or item.step >= end:
                assert not item.is_skipped
            gap = gap + 1 if item.is_skipped else 0
            assert gap < cache.interval, "more steps in a row without a prediction than asked for"
        free = [item for item in own if item.step < end]
        skipped = sum(item.is_skipped for item in own)
        # Of every `interval` sweeps in a row one is computed.
        assert skipped <= len(free) - len(free) // cache.interval
        if all(item.mode == own[0].mode for item in own):
            spread = len(free) - cache.before
            assert spread <= 0 or abs(skipped - spread * (1 - 1 / cache.interval)) < 1
            assert abs(steps - skipped - cache.mean_computed(steps)) < 1


def check_contexts(whole: list[Item], plan: BlockPlan, rules: Rules) -> None:
    """Walk the list: what a pass uses must have been left by a pass of the same mode, in this sweep (right) or last (left)."""
    latest: dict[int, Item] = {}
    done = [0] * plan.num_blocks
    for sweep in range(whole[-1].sweep + 1):
        now = {item.block: item for item in whole if item.sweep == sweep}
        for block, item in now.items():
            if item.is_skipped:
                continue
            behind = now.get(block + 1)
            if behind is None or not plan.num_cat:
                assert item.right is Context.NONE
            elif not behind.is_skipped and behind.mode == item.mode:
                assert item.right is Context.CACHE and behind.keeps_head
            else:
                assert (item.right, item.right_version) == (Context.LATENTS, done[block + 1])
                assert not behind.keeps_head
            if block and plan.num_cat:
                is_cached = rules.context == "cached" and latest[block - 1].mode == item.mode
                assert item.left is (Context.CACHE if is_cached else Context.LATENTS)
                assert not is_cached or latest[block - 1].keeps_tail
                if not is_cached:
                    assert item.left_version == (done[block - 1] if rules.left_context == "latest" else item.step)
        latest |= {block: item for block, item in now.items() if not item.is_skipped}
        for block in now:
            done[block] += 1


@pytest.mark.parametrize("values", [{"interval": 0}, {"before": 0}, {"after": -1}, {"max_order": -1}])
def test_bad_values(values: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        StepCache(**{"interval": 2, "after": 9, **values})


@pytest.mark.parametrize("after", [None, 5])
def test_progress_counts_every_step_and_tells_no_time_from_skipped_ones(after: int | None) -> None:
    rules = Rules(left_context="own_step", max_in_flight=1, step_cache=StepCache(interval=3, before=2, after=after))
    schedule = make_schedule(rules, BlockPlan.of(9, 3, 2), (0,) * 8)
    for start in range(len(schedule.items)):
        reported: list[Progress] = []
        uplink: Any = type("Uplink", (), {"send": lambda _, event, reported=reported: reported.append(event)})()
        report = ProgressReport("abcdef", schedule, uplink, start)
        for item in schedule.items[start:]:
            report.step(item)
        assert all(math.isfinite(event.eta_s) for event in reported)
        assert reported[-1].items_done == reported[-1].num_items == len(schedule.items)
