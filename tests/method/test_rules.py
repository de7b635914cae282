"""Policies are names of numbers: what each of them makes of a request, and that nothing else knows their names."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dualparal
from dualparal.method.rules import POLICIES, as_in_the_paper, depends_on_room, plan_of, rules_of, settle_names
from dualparal.method.schedule import make_schedule
from dualparal.presets import complete
from dualparal.request import CONTEXTS, SCHEDULES, ContextName, GenerationRequest, Settings
from tests.settings import ROOMY, settings


def settled(ranks: int = 1, **values: Any) -> Settings:
    return settings(ranks=ranks, latents_num=60, num_inference_steps=20, num_per_block=4, num_cat=2, **values)


def test_every_name_has_its_numbers() -> None:
    assert tuple(POLICIES) == SCHEDULES


@pytest.mark.parametrize("ranks", [1, 4])
def test_paper_is_all_blocks_a_step_apart_whatever_the_ranks(ranks: int) -> None:
    request = settled(ranks, schedule="paper", max_in_flight=2, stagger=7)
    rules = rules_of(request)
    assert (rules.stagger, rules.left_context, rules.micro_batches) == (1, "latest", False)
    schedule = make_schedule(rules, plan_of(request), (0,) * 20)
    assert schedule.num_in_flight() == min(plan_of(request).num_blocks, 20)
    assert [(item.block, item.step) for item in schedule.items if item.sweep == 2] == [(2, 0), (1, 1), (0, 2)]


@pytest.mark.parametrize("asked", [{}, {"max_in_flight": 4}, {"stagger": 3}, {"micro_batches": False}])
def test_preview_keeps_own_numbers_and_chooses_the_rest(asked: dict[str, Any]) -> None:
    request = settled(2, schedule="preview", **asked)
    assert {name: getattr(request, name) for name in asked} == asked
    assert rules_of(request).left_context == "own_step"


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 9, 19, 20, 50, 100])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 40])
@pytest.mark.parametrize("context", CONTEXTS)
def test_neighbours_are_never_more_than_a_fifth_of_the_steps_apart(num_steps: int, ranks: int, context: ContextName) -> None:
    asked = settings(
        ranks=ranks, schedule="preview", context=context, latents_num=245, num_per_block=8, num_cat=8,
        num_inference_steps=num_steps,
    )  # fmt: skip
    assert asked.stagger <= max(1, num_steps // 5)
    assert asked.max_in_flight == -(-num_steps // asked.stagger)
    if ranks == 1:
        assert asked.stagger == max(1, num_steps // 5)


def test_more_ranks_have_more_blocks_in_flight() -> None:
    found = [
        settings(ranks=ranks, schedule="preview", context="cached", latents_num=245, num_inference_steps=50)
        for ranks in (1, 4, 8)
    ]
    assert [one.stagger for one in found] == sorted((one.stagger for one in found), reverse=True)
    assert found[-1].max_in_flight > found[0].max_in_flight == 5


def test_one_number_set_by_hand_gives_the_other() -> None:
    apart = settled(schedule="preview", stagger=7)
    assert (apart.max_in_flight, apart.stagger) == (3, 7)
    few = settled(schedule="preview", max_in_flight=2)
    assert (few.max_in_flight, few.stagger) == (2, 10)


@pytest.mark.parametrize(
    ("asked", "usual", "roomy", "tight"),
    [
        ("", "auto auto", "preview cached", "paper recomputed"),
        ("auto auto", "paper cached", "preview cached", "paper recomputed"),
        ("paper", "auto auto", "paper recomputed", "paper recomputed"),
        ("preview", "auto auto", "preview cached", "preview cached"),
        ("- recomputed", "auto auto", "paper recomputed", "paper recomputed"),
        ("- cached", "auto auto", "preview cached", "preview cached"),
        ("- recomputed", "preview cached", "paper recomputed", "paper recomputed"),
        ("paper", "preview cached", "paper cached", "paper cached"),
        ("preview", "paper recomputed", "preview cached", "preview cached"),
        ("- cached", "paper recomputed", "paper cached", "paper cached"),
        ("", "paper recomputed", "paper recomputed", "paper recomputed"),
        ("preview recomputed", "auto auto", "preview recomputed", "preview recomputed"),
        ("preview recomputed", "preview recomputed", "preview recomputed", "preview recomputed"),
        ("", "preview auto", "preview cached", "preview cached"),
        ("", "auto recomputed", "paper recomputed", "paper recomputed"),
    ],
)
def test_schedule_and_context_are_chosen_together(asked: str, usual: str, roomy: str, tight: str) -> None:
    given = {name: word for name, word in zip(("schedule", "context"), asked.split(), strict=False) if word != "-"}
    request = GenerationRequest(prompt="x", **given)
    schedule, context = usual.split()
    found = [settle_names(request, schedule, context, has_room=has_room) for has_room in (True, False)]  # type: ignore[arg-type]
    assert found == [tuple(roomy.split()), tuple(tight.split())]
    assert depends_on_room(request, schedule, context) == (found[0] != found[1])  # type: ignore[arg-type]


def test_what_is_as_in_the_paper_takes_none_of_previews_numbers() -> None:
    early = settled(3, schedule="preview", context="cached")
    assert as_in_the_paper(early) == settled(3, schedule="paper", context="recomputed")


def test_nobody_gets_preview_recomputed_who_has_not_asked_for_both() -> None:
    words: Any = itertools.product(
        [None, "auto", *SCHEDULES], [None, "auto", *CONTEXTS], ["auto", *SCHEDULES], ["auto", *CONTEXTS]
    )
    for schedule, context, *usual in words:
        if usual == ["preview", "recomputed"]:
            continue  # a preset's own word
        request = GenerationRequest(prompt="x", schedule=schedule, context=context)
        for has_room in (True, False):
            found = settle_names(request, *usual, has_room=has_room)
            assert found != ("preview", "recomputed") or found == (schedule, context)


def test_a_settled_request_stays_as_it_is() -> None:
    for name in SCHEDULES:
        request = settled(3, schedule=name)
        again = GenerationRequest.from_json(request.to_json())
        assert again == request.as_request() and complete(again, ROOMY, ranks=3) == request
        assert complete(again, ROOMY, ranks=1).max_in_flight == request.max_in_flight, "stored numbers are asked for again"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_per_block", "num_cat"), [(8, 4), (8, 8), (4, 4), (8, 1), (8, 0)])
@pytest.mark.parametrize("num_steps", [4, 20, 50])
def test_refresh_costs_little_by_itself(schedule: str, num_per_block: int, num_cat: int, num_steps: int) -> None:
    for latents_num in (num_per_block + num_cat, 41, 81, 257):
        request = settings(
            schedule=schedule, context="cached", latents_num=latents_num, num_per_block=num_per_block, num_cat=num_cat,
            num_inference_steps=num_steps,
        )  # fmt: skip
        frames = []
        for rules in (rules_of(request), replace(rules_of(request), refresh=0)):
            schedule_of = make_schedule(rules, plan_of(request), (0,) * num_steps)
            frames.append(sum(sum(schedule_of.window_frames(item)) for item in schedule_of.items))
        assert frames[0] < 1.04 * frames[1]


def test_own_refresh_stays_and_zero_is_a_value() -> None:
    assert [settled(refresh=asked).refresh for asked in (0, 7)] == [0, 7]


@pytest.mark.parametrize("room", ["method", "ring", "planning"])
def test_below_the_door_nothing_compares_names(room: str) -> None:
    for file in (Path(dualparal.__file__).parent / room).glob("*.py"):
        if file.name != "rules.py":
            assert not re.search(r"[\"'](paper|preview)[\"']", file.read_text()), file
