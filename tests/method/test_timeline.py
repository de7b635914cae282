"""Prompts over time: borders, block plans, what each block listens to, noise and context at a cut, and the text form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.method.grid import Ring
from dualparal.method.noise import coordinated_noise
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of
from dualparal.method.schedule import ALL_BLOCKS, Context, Rules, make_schedule
from dualparal.method.timeline import TextsAtHand, most_texts, scenes_of, settle_shots, text_plan, written
from dualparal.prompts import Shot
from dualparal.request import GenerationRequest
from tests.settings import settings
from tests.twin import block_lengths, initial_noise, scene_lengths, texts_by_block

TRANSITIONS = ("switch", "blend", "cut")


def shots_of(*shots: tuple[Any, ...]) -> list[dict[str, Any]]:
    """(latents, transition, text), ... as a request has them."""
    return [{"latents_num": n, "transition": how, "prompt": text} for n, how, text in shots]


some_shots = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from(TRANSITIONS), st.sampled_from("abc")), min_size=1, max_size=6
)


@st.composite
def films(draw: st.DrawFn) -> Any:
    num_per_block = draw(st.integers(1, 8))
    num_cat = draw(st.integers(0, num_per_block))
    return settings(shots=shots_of(*draw(some_shots)), num_per_block=num_per_block, num_cat=num_cat)


@given(films())
@tries(max_examples=300, deadline=None)
def test_the_plan_of_a_film(film: Any) -> None:
    plan = plan_of(film)
    scenes = scenes_of(film.shots)
    lengths, cuts = scene_lengths(scenes, film.num_per_block, film.num_cat)
    if len(film.shots) == 1:  # as without a timeline
        lengths, cuts = block_lengths(film.latents_num, film.num_per_block, film.num_cat), []
    assert (list(plan.lengths), list(plan.cuts)) == (lengths, cuts)
    assert plan.latents_num == film.latents_num == sum(shot.latents_num for shot in film.shots)
    # Every shot begins at a block's border, every cut of it at a scene's.
    at, starts = 0, [plan.start(block) for block in range(plan.num_blocks)]
    for number, shot in enumerate(film.shots):
        assert at in starts
        assert (starts.index(at) in plan.cuts) == (number > 0 and shot.transition == "cut")
        at += shot.latents_num
    # Frames: those of a film of its own for every scene, in order, once.
    assert film.num_frames == plan.num_frames == sum(4 * sum(scene) - 3 for scene in scenes)
    assert [frame for block in range(plan.num_blocks) for frame in plan.frames(block)] == list(range(film.num_frames))
    for block in range(plan.num_blocks):
        is_first, is_last = block in (0, *plan.cuts), block + 1 in (*plan.cuts, plan.num_blocks)
        assert plan.num_left(block) == (0 if is_first else min(film.num_cat, plan.lengths[block - 1]))
        assert plan.num_right(block) == (0 if is_last else min(film.num_cat, plan.lengths[block + 1]))
        assert plan.lengths[block] <= film.num_per_block + film.num_cat * is_first


def test_blocks_by_hand() -> None:
    assert BlockPlan.of_scenes([[30, 9, 1]], 8, 4) == BlockPlan((12, 6, 6, 6, 5, 4, 1), 4)
    assert BlockPlan.of_scenes([[3, 17], [20]], 8, 4) == BlockPlan((3, 6, 6, 5, 12, 8), 4, (4,))
    for scenes, num_per_block, num_cat in ([[0]], 8, 4), ([[3]], 0, 0), ([[3]], 2, 3):
        with pytest.raises(ValueError, match="no block plan"):
            BlockPlan.of_scenes(scenes, num_per_block, num_cat)


@given(piece=st.integers(1, 200), num_per_block=st.integers(1, 9), gone=st.integers(0, 30))
@tries(max_examples=200, deadline=None)
def test_what_is_left_of_a_cut_is_such_a_cut(piece: int, num_per_block: int, gone: int) -> None:
    """So a film can be steered at any border of its blocks, and both parts are cut as they were."""
    lengths = BlockPlan.of_scenes([[1, piece]], num_per_block, 0).lengths[1:]
    for part in (lengths[:gone], lengths[gone:]):
        if part:
            assert BlockPlan.of_scenes([[1, sum(part)]], num_per_block, 0).lengths[1:] == part


@given(
    seconds=st.lists(st.floats(0.3, 40), min_size=1, max_size=8), fps=st.sampled_from([7, 8, 16, 24, 30]),
    cuts=st.lists(st.booleans(), min_size=8, max_size=8),
)  # fmt: skip
@tries(max_examples=200, deadline=None)
def test_borders(seconds: list[float], fps: int, cuts: list[bool]) -> None:
    shots = [Shot(prompt="x", seconds=s, transition="cut" if cut else "switch") for s, cut in zip(seconds, cuts, strict=False)]
    try:
        found = settle_shots(shots, fps)
    except RequestError as error:
        assert "is too short" in str(error)
        return
    at_s, border = 0.0, 0
    for number, (shot, settled) in enumerate(zip(shots, found, strict=True)):
        if number and shot.transition == "cut":  # a film of its own
            at_s, border = 0.0, 0
        at_s += shot.seconds or 0
        border += settled.latents_num or 0
        assert border == 1 + round((at_s * fps - 1) / 4)
        assert settled.seconds is None
        assert (settled.prompt, settled.transition) == (shot.prompt, shot.transition)


def test_eight_seconds_are_eight_seconds() -> None:
    film = settings(shots=[{"prompt": "a", "seconds": 8}, {"prompt": "b", "seconds": 4, "transition": "cut"}], fps=16)
    assert [shot.latents_num for shot in film.shots] == [33, 17]
    assert film.num_frames == 129 + 65


def test_a_shot_too_short_is_named() -> None:
    with pytest.raises(
        RequestError, match=r"shots: shot 2 is too short: 0\.05 s are less than one latent frame \(0\.25 s at 16"
    ):
        settings(shots=[{"prompt": "a", "seconds": 8}, {"prompt": "b", "seconds": 0.05}], fps=16)
    with pytest.raises(RequestError, match="up to shot 3 the film has 120000 latent frames; the limit is 100000"):
        settings(shots=shots_of(*[(40_000, "switch", "a")] * 3))


# What blocks listen to


def reported(film: Any) -> list[dict[str, float]]:
    """What each block listens to, as shares of whole texts."""
    found = text_plan(film, plan_of(film))
    shares: list[dict[str, float]] = [{text: 1.0} for text in found.encoded]
    for mixture in found.mixtures:
        parts = ((mixture.old, 1 - mixture.share), (mixture.new, mixture.share))
        shares.append({})
        for number, share in parts:
            for text, part in shares[number].items():
                shares[-1][text] = shares[-1].get(text, 0) + share * part
    return [shares[number] for number in found.of_block]


def test_switch_blend_and_cut() -> None:
    film = settings(prompt="a cat", num_per_block=2, num_cat=1, shots=shots_of(
        (3, "blend", "sits"), (4, "switch", "runs"), (9, "blend", "sleeps"), (2, "cut", "eats"), (3, "blend", "sits"),
    ))  # fmt: skip
    assert plan_of(film).lengths == (3, 2, 2, 2, 2, 2, 2, 1, 2, 2, 1)
    sits, runs, sleeps, eats = "a cat sits", "a cat runs", "a cat sleeps", "a cat eats"
    expected = [
        {sits: 1}, {runs: 1}, {runs: 1},
        {runs: 5 / 6, sleeps: 1 / 6}, {runs: 1 / 2, sleeps: 1 / 2}, {runs: 1 / 6, sleeps: 5 / 6}, {sleeps: 1}, {sleeps: 1},
        {eats: 1}, {eats: 5 / 6, sits: 1 / 6}, {eats: 1 / 2, sits: 1 / 2},
    ]  # fmt: skip
    assert [{text: pytest.approx(share) for text, share in block.items()} for block in expected] == reported(film)
    assert text_plan(film, plan_of(film)).encoded == (sits, runs, sleeps, eats), "each text once"


def test_a_blend_of_a_blend() -> None:
    film = settings(
        prompt="", num_per_block=1, num_cat=0, shots=shots_of((1, "switch", "a"), (1, "blend", "b"), (1, "blend", "c"))
    )
    assert reported(film)[1:] == [
        pytest.approx({"a": 5 / 6, "b": 1 / 6}), pytest.approx({"a": 25 / 36, "b": 5 / 36, "c": 1 / 6}),
    ]  # fmt: skip


@given(films())
@tries(max_examples=200, deadline=None)
def test_texts_as_the_twin_says_them(film: Any) -> None:
    plan, found = plan_of(film), text_plan(film, plan_of(film))
    tensors = {text: torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(ord(text[-1]))) for text in found.encoded}
    shots = [(shot.latents_num, tensors[f"x {shot.prompt}"], shot.transition) for shot in film.shots]
    expected = texts_by_block(shots, plan.lengths)
    texts = [tensors[text] for text in found.encoded]
    for mixture in found.mixtures:
        texts.append((1 - mixture.share) * texts[mixture.old] + mixture.share * texts[mixture.new])
    assert all(torch.equal(texts[number], other) for number, other in zip(found.of_block, expected, strict=True))


# Noise and context at a cut


@given(films())
@tries(max_examples=100, deadline=None)
def test_noise(film: Any) -> None:
    plan = plan_of(film)
    shape = {"channels": 1, "height": 2, "width": 1}
    found = list(coordinated_noise(plan, film.num_per_block, 7, **shape))
    expected = initial_noise(plan.lengths, film.num_per_block, film.num_cat, (1, 2, 1), 7, plan.cuts)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    names = [[float(frame.flatten()[0]) for frame in block.unbind(2)] for block in found]
    for block in range(plan.num_blocks):
        left = plan.num_left(block)
        window = (names[block - 1][-left:] if left else []) + names[block]
        assert len(set(window)) == len(window)
    scene = -1
    drawn: list[set[float]] = []
    for block, own in enumerate(names):
        if plan.begins_scene(block):
            scene += 1
            drawn.append(set())
        drawn[scene] |= set(own)
    assert sum(map(len, drawn)) == len(set().union(*drawn)), "two scenes share noise"


rules_of_any_kind = st.builds(
    Rules, max_in_flight=st.sampled_from([1, 2, 3, ALL_BLOCKS]), stagger=st.integers(1, 4),
    left_context=st.sampled_from(["latest", "own_step"]), context=st.sampled_from(["recomputed", "cached"]),
    refresh=st.integers(0, 3), micro_batches=st.booleans(),
)  # fmt: skip


@given(films(), rules_of_any_kind, st.integers(1, 6), st.integers(0, 6))
@tries(max_examples=150, deadline=None)
def test_nothing_crosses_a_cut(film: Any, rules: Rules, num_steps: int, switch: int) -> None:
    plan = plan_of(film)
    schedule = make_schedule(rules, plan, [int(step >= switch) for step in range(num_steps)])
    for item in schedule.items:
        if plan.begins_scene(item.block):
            assert item.left is Context.NONE
            assert not item.keeps_head, "nobody to its left would take it"
        else:
            assert (item.left is Context.NONE) == (film.num_cat == 0)
        if item.block + 1 in plan.cuts:
            assert item.right is Context.NONE
            assert not item.keeps_tail


def test_without_shots_nothing_has_changed() -> None:
    plain = settings(latents_num=53, num_per_block=5, num_cat=3)
    plan = plan_of(plain)
    assert plan == BlockPlan.of(53, 5, 3)
    assert plan.cuts == ()
    assert text_plan(plain, plan).of_block == (0,) * plan.num_blocks
    one = settings(prompt="x", shots=shots_of((53, "cut", "")), num_per_block=5, num_cat=3)
    assert plan_of(one) == plan
    assert text_plan(one, plan) == text_plan(plain, plan)


# Texts at hand


@given(films(), rules_of_any_kind, st.integers(1, 5), st.integers(0, 2), st.sampled_from([None, 0, 1]))
@tries(max_examples=150, deadline=None)
def test_texts_are_at_hand_while_blocks_in_flight_listen(
    film: Any, rules: Rules, num_steps: int, sweeps_gone: int, ring: Ring
) -> None:
    plan = plan_of(film)
    of_block = text_plan(film, plan).of_block
    rules = replace(rules, micro_batches=rules.micro_batches or ring is not None)
    schedule = make_schedule(rules, plan, (0,) * num_steps)
    items = [item for item in schedule.on_ring(ring) if item.sweep >= sweeps_gone]
    at_hand, walker, most = set(), TextsAtHand(of_block, schedule.last_on_ring(ring)), 0
    for place, item in enumerate(items):
        if (came := walker.comes(item)) is not None:
            assert came not in at_hand
            at_hand.add(came)
        assert of_block[item.block] in at_hand
        most = max(most, len(at_hand))
        if (gone := walker.goes(item)) is not None:
            at_hand.remove(gone)
        seen = {other.block for other in items[: place + 1]}
        to_come = {other.block for other in items[place + 1 :]}
        assert at_hand == {of_block[block] for block in seen & to_come}
    assert not at_hand
    in_flight = make_schedule(rules, plan, (0,) * num_steps).num_in_flight()
    assert most <= most_texts(of_block, in_flight)


def test_most_texts() -> None:
    assert most_texts((0, 0, 1, 2, 0, 0, 0), 1) == 1
    assert most_texts((0, 0, 1, 2, 0, 0, 0), 2) == 2
    assert most_texts((0, 0, 1, 2, 0, 0, 0), 3) == 3
    assert most_texts((0, 1), 50) == 2


# As people write it


@given(films(), st.sampled_from([7, 16, 24]))
@tries(max_examples=200, deadline=None)
def test_written_and_read_again(film: Any, fps: int) -> None:
    film = film.model_copy(update={"fps": fps})
    again = settings(**{**film.as_request().model_dump(exclude_none=True, exclude={"shots"}), "prompt": written(film)})
    assert again == film


def test_written_as_it_was() -> None:
    text = "a cat\n[8s] sits\nand\n[2.5s blend] runs\n[0.3s cut]\n[4s cut] sleeps"
    assert written(settings(prompt=text, fps=16)) == text
    assert written(settings(prompt="a [cat]", seconds=3)) == "a [cat]"
    assert GenerationRequest(prompt=text).shots is not None
