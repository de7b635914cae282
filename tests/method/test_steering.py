"""Steering: the new timeline, and that its schedule agrees with the old one in everything that was done before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.method.rules import plan_of
from dualparal.method.schedule import Item, Rules, Schedule, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.method.timeline import steered, text_plan
from dualparal.prompts import MAX_PROMPT_CHARS, MAX_SHOTS, shot_from_here
from dualparal.request import Settings
from tests.method.test_timeline import TRANSITIONS, shots_of, some_shots
from tests.settings import settings


def test_a_film_without_shots() -> None:
    film = settings(prompt="a cat", latents_num=20, num_per_block=3, num_cat=2)
    new = steered(film, plan_of(film), 2, shot_from_here(" a dog ", "blend"))
    assert new.prompt == "" and new.latents_num == 20
    assert [(s.prompt, s.latents_num, s.transition) for s in new.shots or ()] == [
        ("a cat", 8, "switch"),
        ("a dog", 12, "blend"),
    ]
    assert plan_of(new).lengths == (5, 3, 3, 3, 3, 3)
    plan = text_plan(new, plan_of(new))
    assert plan.encoded == ("a cat", "a dog") and plan.of_block == (0, 0, 2, 3, 4, 1)


def test_all_later_shots_are_replaced() -> None:
    film = settings(
        prompt="film", shots=shots_of((6, "switch", "a"), (6, "cut", "b"), (6, "cut", "c")), num_per_block=3, num_cat=1
    )
    assert plan_of(film).lengths == (4, 2, 4, 2, 4, 2)
    told = steered(film, plan_of(film), 3, shot_from_here("d"))
    assert told.prompt == "film"
    assert [(s.prompt, s.latents_num, s.transition) for s in told.shots or ()] == [
        ("a", 6, "switch"), ("b", 4, "cut"), ("d", 8, "switch"),
    ]  # fmt: skip
    again = steered(told, plan_of(told), 3, shot_from_here("e"))
    assert [s.prompt for s in again.shots or ()] == ["a", "b", "e"], "of two before an entry the last wins"
    at_cut = steered(film, plan_of(film), 4, shot_from_here("d", "blend"))
    assert (at_cut.shots or ())[-1].transition == "cut", "what would be seen across it has not been kept"


def test_a_timeline_too_large() -> None:
    film = settings(shots=shots_of(*[(1, "switch", "a")] * (MAX_SHOTS - 1), (2, "switch", "b")), num_per_block=1, num_cat=0)
    with pytest.raises(RequestError, match="201 shots are too many"):
        steered(film, plan_of(film), MAX_SHOTS, shot_from_here("c"))


@pytest.mark.parametrize(
    ("prompt", "transition", "sentence"),
    [
        ("", None, "prompt='': the prompt is empty; say what the film shows from here on"),
        (7, None, "prompt=7: the prompt is empty"),
        ("x" * (MAX_PROMPT_CHARS + 1), None, "4001 characters are too many; the limit is 4000"),
        ("a\n[2s] b", None, "begins with a number in brackets"),
        ("a", "fade", "transition='fade': should be 'switch', 'blend' or 'cut'"),
        ("a", 3, "transition=3: should be 'switch', 'blend' or 'cut'"),
    ],
)
def test_what_is_refused(prompt: Any, transition: Any, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        shot_from_here(prompt, transition)
    assert sentence in str(caught.value)


def before(schedule: Schedule, end: int) -> list[Item]:
    """What stages did of the items before `end`, but for K and V that they kept for a right neighbour."""
    return [replace(item, keeps_tail=False) for item in schedule.items[:end]]


@given(
    some_shots, st.integers(1, 8), st.data(), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["latest", "own_step"]),
    st.sampled_from(["recomputed", "cached"]), st.booleans(), st.integers(0, 4), st.integers(1, 3),
)  # fmt: skip
@tries(max_examples=200, deadline=None)
def test_schedules_agree_up_to_the_entry(
    shots: Any, num_per_block: int, data: st.DataObject, in_flight: int, stagger: int, left: Any, context: str,
    micro_batches: bool, refresh: int, interval: int,
) -> None:  # fmt: skip
    num_cat = data.draw(st.integers(0, num_per_block))
    film = settings(shots=shots_of(*shots), num_per_block=num_per_block, num_cat=num_cat)
    plan = plan_of(film)
    block = data.draw(st.integers(0, plan.num_blocks - 1))
    new: Settings = steered(film, plan, block, shot_from_here("new", data.draw(st.sampled_from(TRANSITIONS))))
    rules = Rules(
        max_in_flight=in_flight, stagger=stagger, left_context=left, context=context, micro_batches=micro_batches,
        refresh=refresh, step_cache=StepCache(interval=interval, max_order=1, before=1, after=5) if interval > 1 else None,
    )  # fmt: skip
    old_schedule, new_schedule = (make_schedule(rules, plan_of(one), (0, 0, 0, 1, 1, 1)) for one in (film, new))
    assert plan_of(new).lengths[:block] == plan.lengths[:block] and plan_of(new).latents_num == plan.latents_num
    entry = next(item.index for item in old_schedule.items if item.block == block)
    assert before(new_schedule, entry) == before(old_schedule, entry)
    for old, then in zip(old_schedule.items[:entry], new_schedule.items[:entry], strict=True):
        assert old.keeps_tail or not then.keeps_tail, "K and V that will be used have been kept"
    for name in ("last_left_use", "last_right_use"):
        kept, needed = getattr(old_schedule, name), getattr(new_schedule, name)
        due = {key for key, use in needed.items() if use >= entry and key[0] < block and _is_there(old_schedule, key, entry)}
        assert due <= kept.keys(), "ends that will be seen have been kept"


def _is_there(schedule: Schedule, key: tuple[int, int], end: int) -> bool:
    block, version = key
    return any(item.block == block and item.step + 1 >= version for item in schedule.items[:end])
