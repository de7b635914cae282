"""Plans of films of shots: texts at hand are counted, the quick look is never below the whole, frames are the film's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from dualparal.cli.main import main
from dualparal.planning.job_plan import JobPlan, plan_job
from dualparal.planning.placement import ModelSizes, Placement
from dualparal.presets import complete, load_presets
from dualparal.request import GenerationRequest


def plan(*, is_short: bool = False, name: str = "wan2.1-14b-480p", **values: Any) -> JobPlan:
    preset = load_presets()[name]
    model = ModelSizes.published(preset.model)
    assert model is not None
    request = complete(GenerationRequest(**values), preset, ranks=4, num_experts=model.num_experts)
    return plan_job(request, model, Placement(layers=(10, 10, 10, 10), codec_rank=3), is_short=is_short)


def text_bytes(found: JobPlan) -> int:
    return sum(rank.text for rank in found.memory.ranks)


def test_each_text_at_hand_is_counted() -> None:
    few = {"schedule": "preview", "max_in_flight": 3, "stagger": 17}
    one = plan(prompt="x", latents_num=132, **few)
    same = plan(prompt="[8s] x\n[8s] x\n[16s] x", **few)
    two = plan(prompt="[8s] x\n[8s] y\n[16s] x", **few)
    four = plan(prompt="[8s] x\n[8s blend] y\n[16s] x", **few)
    assert text_bytes(same) == text_bytes(one)
    per_text = text_bytes(two) - text_bytes(one)
    assert 0.8e9 < per_text < 0.9e9, "0.8 GB for each with 14B"
    assert text_bytes(four) - text_bytes(one) == 2 * per_text, "three blocks in flight listen to three texts at most"
    assert two.memory.ranks[1].messages - one.memory.ranks[1].messages == 5 * 512 * 5120 * 2, "one travels with the activations"
    assert text_bytes(plan(prompt="[8s] x\n[8s] y\n[16s] z\n[4s] a", schedule="paper")) - text_bytes(one) == 3 * per_text


some_shots = st.tuples(st.integers(1, 60), st.sampled_from(["switch", "blend", "cut"]), st.sampled_from("abc"))


@given(
    st.lists(some_shots, min_size=2, max_size=12),
    st.sampled_from(["recomputed", "cached"]),
)  # fmt: skip
@tries(max_examples=15, deadline=None)
def test_a_quick_look_is_never_below_the_whole(shots: list[tuple[int, str, str]], context: str) -> None:
    film: dict[str, Any] = dict(
        shots=[{"latents_num": n, "transition": how, "prompt": text} for n, how, text in shots], context=context,
        num_inference_steps=10, num_per_block=4, num_cat=4,
    )  # fmt: skip
    whole, short = plan(**film), plan(**film, is_short=True)
    for one, other in zip(whole.memory.ranks, short.memory.ranks, strict=True):
        assert one.total <= other.total
    assert short.num_frames == whole.num_frames == whole.workload.schedule.plan.num_frames


def test_two_experts_hold_a_text_each() -> None:
    film = "[8s] x\n[8s] y"
    one, two = (text_bytes(plan(prompt=film, name=name)) for name in ("wan2.1-14b-480p", "wan2.2-a14b-480p"))
    assert two > 1.9 * one


def test_the_command_plans_a_film(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", "--gpus", "1", "--prompt", "[8s] a\n[4s cut] b"]) == 0
    printed = capsys.readouterr().out
    assert "194 frames" in printed


@pytest.mark.parametrize("prompt", ["x", "[8s] x\n[8s cut] y"])
@pytest.mark.parametrize("schedule", ["paper", "preview"])
@pytest.mark.parametrize("latents_num", [2, 40, 1000])
def test_a_film_that_begins_with_a_picture(prompt: str, schedule: str, latents_num: int) -> None:
    values = {"prompt": prompt, "schedule": schedule, **({} if "[" in prompt else {"latents_num": latents_num})}
    begun, other = plan(start_image="a.png", **values), plan(**values)
    assert begun.num_frames == other.num_frames == begun.request.num_frames
    assert begun.refusal is None and begun.workload.schedule.plan.num_left(0) == 1
    quick, whole = (
        max(rank.total for rank in found.memory.ranks) for found in (plan(is_short=True, start_image="a.png", **values), begun)
    )
    assert quick >= whole


def test_plan_knows_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    told = ["plan", "--preset", "wan2.1-1.3b-480p", "--gpus", "1", "--prompt", "a", "--start_image"]
    assert main([*told, "a.png"]) == 0
    assert "157 frames (9.8 s) of 832x480 in 5 blocks" in capsys.readouterr().out
    assert main([*told, "a.png", "--num_cat", "0"]) != 0
