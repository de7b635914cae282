"""Few steps keep few ranks busy, and whoever has more is told what to do with them."""

from __future__ import annotations

import pytest

from dualparal.errors import RequestError
from dualparal.method.event_model import even_cost, forecast
from dualparal.method.grid import Grid
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import make_schedule
from dualparal.planning.idle import idle_ranks
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest, Settings


def few(steps: int, ranks: int, **more: object) -> Settings:
    preset = Preset(guidance_scale=1.0, num_inference_steps=steps)
    return complete(GenerationRequest(prompt="x", latents_num=200, schedule="paper", **more), preset, ranks=ranks)


@pytest.mark.parametrize(("steps", "ranks", "words"), [
    (4, 4, ""), (8, 8, ""), (4, 5, "--ranks 4 takes no longer"), (4, 8, "--ranks 4 --replicas 2 makes 2 videos at a time"),
    (1, 3, "with 1 step at most 1 block"), (4, 12, "about 4 of 12 ranks"),
])  # fmt: skip
def test_more_ranks_than_steps(steps: int, ranks: int, words: str) -> None:
    said = idle_ranks(few(steps, ranks), Grid(ranks))
    assert words in said and bool(words) == bool(said) and "\n" not in said


@pytest.mark.parametrize(("steps", "ranks"), [(4, 4), (4, 8), (8, 8)])
def test_the_event_model_says_the_same(steps: int, ranks: int) -> None:
    settings = few(steps, ranks)
    schedule = make_schedule(rules_of(settings), plan_of(settings), (0,) * steps)
    assert schedule.num_in_flight() <= steps
    busy = sum(forecast(schedule, ranks, even_cost(schedule, ranks)).busy)
    assert busy <= steps + 0.01
    assert busy > 0.6 * min(steps, ranks), "and not many fewer, but for filling and draining"


def test_guidance_halves_that_travel_alone_count_twice() -> None:
    asked = GenerationRequest(prompt="x", schedule="paper", micro_batches=True)
    settings = complete(asked, Preset(guidance_scale=5.0, num_inference_steps=4), ranks=8)
    assert idle_ranks(settings, Grid(8)) == "" and idle_ranks(settings, Grid(9))


def test_a_second_ring_wants_guidance_and_steps() -> None:
    preset = Preset(guidance_scale=5.0, num_inference_steps=4)
    guided = complete(GenerationRequest(prompt="x", schedule="paper"), preset, ranks=4, rings=2)
    assert guided.micro_batches and idle_ranks(guided, Grid(4, 2)) == ""
    assert "about 8 of 12 ranks are busy: --ranks 8 takes no longer" in idle_ranks(guided, Grid(6, 2))
    assert "half of the 8 ranks have nothing to do: --guidance_parallel 1" in idle_ranks(few(4, 4), Grid(4, 2))


def test_step_caching_wants_steps() -> None:
    with pytest.raises(RequestError, match="with 7 steps there is too little to extrapolate from; use at least 8") as caught:
        few(7, 1, cache_interval=2)
    assert caught.value.field == "cache_interval"
    assert few(8, 1, cache_interval=2).cache_interval == 2 and few(4, 1, cache_interval=1).cache_interval == 1
