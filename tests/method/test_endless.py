"""Endless films: whatever is planned ahead, and wherever it ends, schedules agree in all that was done before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.method import endless
from dualparal.method.endless import extended, wrapped_up
from dualparal.method.noise import CoordinatedNoise
from dualparal.method.rules import plan_of
from dualparal.method.schedule import Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.method.timeline import TextPlan, steered, text_plan
from dualparal.prompts import shot_from_here
from dualparal.request import MAX_LATENTS, GenerationRequest, Settings
from tests.method.test_steering import before
from tests.method.test_timeline import TRANSITIONS, shots_of, some_shots
from tests.settings import settings

EXPERTS = (0, 0, 0, 1, 1, 1)


@pytest.fixture(autouse=True, scope="module")
def few_blocks_ahead() -> Iterator[None]:
    before, endless.BLOCKS_AHEAD = endless.BLOCKS_AHEAD, 3
    yield
    endless.BLOCKS_AHEAD = before


def agree(old: Settings, new: Settings, rules: Rules, end: int | None = None) -> None:
    """Up to item `end` (default: the entry of the old plan's last block) both schedules are one."""
    plans = plan_of(old), plan_of(new)
    schedules = [make_schedule(rules, plan, EXPERTS) for plan in plans]
    if end is None:
        end = next(item.index for item in schedules[0].items if item.block == plans[0].num_blocks - 1)
    entered = 1 + max((item.block for item in schedules[0].items[:end]), default=-1)
    assert plans[0].lengths[:entered] == plans[1].lengths[:entered]
    assert before(schedules[0], end) == before(schedules[1], end)
    for was, now in zip(schedules[0].items[:end], schedules[1].items[:end], strict=True):
        assert was.keeps_tail or not now.keeps_tail, "K and V that will be used have been kept"
    texts = [heard(text_plan(one, plan))[:entered] for one, plan in zip((old, new), plans, strict=True)]
    assert texts[0] == texts[1]


def heard(plan: TextPlan) -> list[Any]:
    """What each block listens to, whatever its number: a text, or two and the share of the second."""

    def name(number: int) -> Any:
        if number < len(plan.encoded):
            return plan.encoded[number]
        mixture = plan.mixtures[number - len(plan.encoded)]
        return name(mixture.old), name(mixture.new), mixture.share

    return [name(number) for number in plan.of_block]


@given(
    st.one_of(st.none(), some_shots), st.integers(1, 6), st.data(), st.integers(1, 5), st.integers(1, 4),
    st.sampled_from(["latest", "own_step"]), st.sampled_from(["recomputed", "cached"]), st.booleans(), st.integers(0, 4),
    st.integers(1, 3), st.sampled_from([{}, {"continue_from": "0" * 6}, {"start_image": "a.png"}]),
)  # fmt: skip
@tries(max_examples=60, deadline=None)
def test_extended_steered_and_wrapped_up(
    shots: Any, num_per_block: int, data: st.DataObject, in_flight: int, stagger: int, left: Any, context: str,
    micro_batches: bool, refresh: int, interval: int, begins: dict[str, str],
) -> None:  # fmt: skip
    num_cat = data.draw(st.integers(1 if begins else 0, num_per_block))
    values: dict[str, Any] = {"shots": shots_of(*shots)} if shots else {}
    try:
        film = settings(num_per_block=num_per_block, num_cat=num_cat, is_endless=True, **values, **begins)
    except RequestError:  # a picture, and a first shot of one latent
        return
    rules = Rules(
        max_in_flight=in_flight, stagger=stagger, left_context=left, context=context, micro_batches=micro_batches,
        refresh=refresh, step_cache=StepCache(interval=interval, max_order=1, before=1, after=5) if interval > 1 else None,
    )  # fmt: skip
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, plan_of(film).num_blocks - 1))
        film = steered(film, plan_of(film), at, shot_from_here("new", data.draw(st.sampled_from(TRANSITIONS))))
    longer = extended(film, plan_of(film))
    assert longer.is_endless and plan_of(longer).num_blocks - plan_of(film).num_blocks == max(3, plan_of(film).num_blocks // 4)
    assert plan_of(longer).lengths[: plan_of(film).num_blocks] == plan_of(film).lengths
    agree(film, longer, rules)
    schedule = make_schedule(rules, plan_of(longer), EXPERTS)
    end = data.draw(st.integers(0, len(schedule.items) - 1))
    entered = 1 + max((item.block for item in schedule.items[:end]), default=-1)
    ended = wrapped_up(longer, plan_of(longer), entered)
    assert not ended.is_endless and plan_of(ended).num_blocks >= max(1, entered)
    assert plan_of(ended).num_frames == ended.num_frames
    agree(longer, ended, rules, end)


def test_a_film_without_shots_ends_where_it_is_asked_to() -> None:
    film = settings(prompt="a cat", num_per_block=4, num_cat=2, is_endless=True)
    assert film.latents_num == 2 + 3 * 4 and plan_of(film).lengths == (6, 4, 4)
    ended = wrapped_up(film, plan_of(film), 2)
    assert ended == settings(prompt="a cat", num_per_block=4, num_cat=2, latents_num=10, refresh=film.refresh)


def test_noise_goes_on_where_the_plan_was_made_longer() -> None:
    film = settings(prompt="a cat", num_per_block=4, num_cat=2, is_endless=True)
    longer = extended(film, plan_of(film))
    shape = {"channels": 2, "height": 1, "width": 2}
    whole = list(CoordinatedNoise(plan_of(longer), 4, 7, **shape))
    noise = CoordinatedNoise(plan_of(film), 4, 7, **shape)
    found = [next(noise), next(noise)]
    noise.follow(plan_of(longer))
    found += list(noise)
    assert len(found) == len(whole) == 6 and all((a == b).all() for a, b in zip(found, whole, strict=True))


def test_the_longest_film_there_may_be() -> None:
    film = settings(prompt="a cat", num_per_block=4, num_cat=2, is_endless=True)
    film = film.model_copy(update={"latents_num": MAX_LATENTS - 2})
    assert extended(film, plan_of(film)) == film.model_copy(update={"is_endless": False})


def test_what_an_endless_film_is_asked_with() -> None:
    film = GenerationRequest(prompt="x\n[2s] a\n[9s] b", is_endless=True)
    assert settings(**film.model_dump(exclude_none=True, exclude={"seed"})).shots[1].latents_num == 3 * 8  # type: ignore[index]
    shots = [{"prompt": "a", "latents_num": 5}, {"prompt": "b"}]
    assert settings(shots=shots, is_endless=True).shots[1].latents_num == 3 * 8  # type: ignore[index]
    with pytest.raises(RequestError, match="shot 2 has no length"):
        GenerationRequest(shots=shots)
    with pytest.raises(RequestError, match="shot 1 has no length"):
        GenerationRequest(shots=list(reversed(shots)), is_endless=True)
    for length in ("seconds", "latents_num", "num_frames"):
        with pytest.raises(RequestError, match=f"an endless film has no length; leave {length} out"):
            GenerationRequest(prompt="a", is_endless=True, **{length: 5})
    again = settings(prompt="a", is_endless=True).as_request()
    assert again.is_endless and again.latents_num is None
