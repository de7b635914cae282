"""A request is usable or refused in one sentence, and seconds, frames and latent frames agree."""

from __future__ import annotations

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import rules_of
from dualparal.method.schedule import Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.presets import Limits, Preset, complete, restore
from dualparal.request import (
    MAX_LATENTS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    NOT_ASKED,
    GenerationRequest,
    Settings,
    frames_of_latents,
    latents_of_seconds,
)

PRESET = Preset(limits=Limits(seconds=20_000))
OPTIONAL = [name for name, info in GenerationRequest.model_fields.items() if not info.is_required()]
TEXT = ("prompt", "negative_prompt")
CHOICES = {
    "schedule": ["paper", "preview", "auto"],
    "context": ["recomputed", "cached", "auto"],
    "solver": ["unipc", "euler", "dpm++"],
}
NO_NUMBERS = (
    *TEXT, *CHOICES, "micro_batches", "shots", "start_image", "loras", "continue_from", "join", "is_endless"
)  # fmt: skip
NUMBERS = [name for name in OPTIONAL if name not in NO_NUMBERS]
# field: (values that are fine, values that are not)
RANGES: dict[str, tuple[list[object], list[object]]] = {
    "latents_num": ([1, 40, MAX_LATENTS, 40.0], [0, -1, MAX_LATENTS + 1, 1.5]),
    "num_frames": ([1, 5, 157], [0, -3, 2, 3, 4, 156, 10**9 + 1, 5.5]),
    "seconds": ([0.01, 5, 25_000], [0, -1, 25_001, 1e300]),
    "height": ([16, 480, 8192], [0, -16, 8, 17, 481, 8208, 10**9]),
    "width": ([16, 832, 8192], [0, -16, 8, 17, 833, 8208, 10**9]),
    "fps": ([1, 16, 120], [0, -16, 121, 23.976]),
    "num_inference_steps": ([1, 50, 1000], [0, -1, 1001, 2.5]),
    "guidance_scale": ([0, 1, 5.5, 100], [-0.1, 100.1]),
    "guidance_scale_2": ([0, 1, 5.5, 100], [-0.1, 100.1]),
    "lead": ([0, 2, 7.5, 25_000], [-0.1, 25_001, 1e300]),
    "guidance_start": ([0, 0.2, 1], [-0.1, 1.1]),
    "guidance_stop": ([0, 0.6, 1], [-0.1, 1.1]),
    "boundary_ratio": ([0, 0.875, 1], [-0.1, 1.1]),
    "flow_shift": ([0.1, 12, 100], [0, -3, 101]),
    "seed": ([0, 7, MAX_SEED], [-1, MAX_SEED + 1, 10**5000, 0.5]),
    "num_per_block": ([1, 8, 1024], [0, -8, 1025, 8.5]),
    "num_cat": ([0, 8, 1024], [-1, 1025, 0.5]),
    "refresh": ([0, 1, 13, 1000], [-1, 1001, 1.5]),
    "max_in_flight": ([1, 3, 1024], [0, -1, 1025, 1.5]),
    "stagger": ([1, 16, 1000], [0, -1, 1001, 1.5]),
    "cache_interval": ([1, 2, 1000], [0, -1, 1001, 1.5]),
    "cache_order": ([0, 1, 2], [-1, 3, 0.5]),
    "disable_cache_before_step": ([1, 3, 1000], [0, -1, 1001, 1.5]),
    "disable_cache_after_step": ([0, 40, 1000], [-1, 1001, 1.5]),
    "takes": ([1, 2, 4], [0, -1, 5, 1.5]),
}


def refused(**values: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        GenerationRequest(**values)
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 600
    assert "pydantic" not in text
    return caught.value


def test_every_number_has_a_row() -> None:
    assert set(RANGES) == set(NUMBERS)


@pytest.mark.parametrize("field", NUMBERS)
def test_range(field: str) -> None:
    good, bad = RANGES[field]
    for value in good:
        assert getattr(GenerationRequest(prompt="x", **{field: value}), field) == value
    for value in bad:
        error = refused(prompt="x", **{field: value})
        assert error.field == field
        assert str(error).startswith(f"{field}=")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "",
        "many",
        "<b>5</b>",
        [5],
        (5,),
        {"a": 5},
        True,
        False,
        b"\xff",
        5j,
        object(),
        "9" * 100_000,
    ],
)
def test_wrong_type_of_number(field: str, value: object) -> None:
    assert refused(prompt="x", **{field: value}).field == field


@pytest.mark.parametrize("field", OPTIONAL)
def test_none_means_from_the_preset(field: str) -> None:
    assert getattr(GenerationRequest(prompt="x", **{field: None}), field) is None
    assert getattr(GenerationRequest(prompt="x"), field) is None


@pytest.mark.parametrize("field", TEXT)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "string"),
        (["x"], "string"),
        (b"x", "string"),
        (True, "true and false"),
        (math.nan, "string"),
        ("x" * (MAX_PROMPT_CHARS + 1), "4001 characters are too many; the limit is 4000"),
        ("y\n" * 50_000, "100000 characters"),
        ("\ud800", "surrogate"),
    ],
)
def test_wrong_text(field: str, value: object, words: str) -> None:
    error = refused(**{"prompt": "x", field: value})
    assert error.field == field
    assert words in str(error)


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", [5, "", "zigzag", "PAPER", ["paper"], True, math.nan, "<b>"])
def test_choices(field: str, value: object) -> None:
    for choice in CHOICES[field]:
        assert getattr(GenerationRequest(prompt="x", **{field: choice}), field) == choice
    error = refused(prompt="x", **{field: value})
    assert error.field == field


@pytest.mark.parametrize("field", CHOICES)
def test_choices_are_named(field: str) -> None:
    for choice in CHOICES[field]:
        assert choice in str(refused(prompt="x", **{field: "zigzag"}))


def test_micro_batches_is_yes_or_no() -> None:
    for value in (True, False):
        assert GenerationRequest(prompt="x", micro_batches=value).micro_batches is value
    for bad in (2, -1, math.nan, "maybe", "", [True], 0.5):
        assert refused(prompt="x", micro_batches=bad).field == "micro_batches"


def test_prompt_is_needed() -> None:
    assert str(refused()) == "prompt is missing: what the video shows"
    assert refused(prompt=None).field == "prompt"


@pytest.mark.parametrize(
    "prompt", ["<script>alert(1)</script>", "日本語 🦊", "a\nb\tc", "x" * MAX_PROMPT_CHARS, "{not: json}", "%s \\ ' \""]
)
def test_prompt_is_kept_as_it_is(prompt: str) -> None:
    assert GenerationRequest(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\r", "\x1b[0m", "\u3000"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    assert "the prompt is empty; say what the video should show" in str(refused(prompt=prompt))
    assert GenerationRequest(prompt="x", negative_prompt=prompt).negative_prompt is not None


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("a\0b\x7fc", "abc"),
        ("a\r\nb", "a\nb"),
        ("a\rb\fc\vd\x1ce\x85f", "a b c d e f"),
        ("a\x1b[31mred\x1b[0mb", "a red b"),
        ("a\x1b]8;;http://x\x07link\x1b]8;;\x1b\\b", "a link b"),
        ("a\x1bb", "a b"),
        ("a\u2028b\u00a0c", "a\u2028b\u00a0c"),
    ],
)
def test_what_moves_the_cursor_becomes_a_blank(typed: str, kept: str) -> None:
    assert GenerationRequest(prompt=typed, negative_prompt=typed).prompt == kept


def test_guidance_does_not_end_before_it_begins() -> None:
    assert "guidance_start=0.8 is after guidance_stop=0.2; use guidance_start between 0 and 0.2" in str(
        refused(prompt="x", guidance_start=0.8, guidance_stop=0.2)
    )
    assert GenerationRequest(prompt="x", guidance_start=0.5, guidance_stop=0.5)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("promt", "prompt"),
        ("hieght", "height"),
        ("steps", "num_inference_steps"),
        ("num_frame", "num_frames"),
        ("Seed", "seed"),
    ],
)
def test_unknown_field_names_the_nearest(key: str, near: str) -> None:
    error = refused(prompt="x", **{key: 1})
    assert f"{key} is not a field of a request; did you mean {near}?" in str(error)
    assert error.field == key


@pytest.mark.parametrize("key", ["self", "a b", "x\ny", "k" * 100_000, "", "__class__", "model_config"])
def test_odd_unknown_fields(key: str) -> None:
    refused(prompt="x", **{key: 1})


def test_sizes_and_frames_name_the_way_out() -> None:
    assert "use 480 or 496" in str(refused(prompt="x", height=481))
    assert "use 153 or 157" in str(refused(prompt="x", num_frames=156))
    assert "latents_num and seconds both give the length" in str(refused(prompt="x", seconds=3, latents_num=4))
    assert "use num_cat between 0 and 4" in str(refused(prompt="x", num_per_block=4, num_cat=5))


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(refused(prompt="x", height=481)))
    assert error.field == "height"
    assert isinstance(error, ValueError)


def test_requests_are_frozen_and_picklable() -> None:
    request = GenerationRequest(prompt="x", seed=3)
    assert pickle.loads(pickle.dumps(request)) == request
    with pytest.raises(ValueError, match="frozen"):
        request.seed = 4  # type: ignore[misc]


@given(st.floats(0.001, 25_000), st.integers(1, 120))
def test_seconds_become_the_fewest_frames_that_last_as_long(seconds: float, fps: int) -> None:
    frames = frames_of_latents(latents_of_seconds(seconds, fps))
    wanted = seconds * fps
    assert frames >= 1
    assert frames > wanted - 1e-6
    if wanted > 1:
        assert frames < wanted + 4
        assert frames == pytest.approx(4 * math.ceil((wanted - 1) / 4 - 1e-9) + 1)
    else:
        assert frames == 1


@given(st.integers(1, MAX_LATENTS), st.integers(1, 120))
def test_the_length_of_a_video_gives_that_video_again(latents_num: int, fps: int) -> None:
    frames = frames_of_latents(latents_num)
    assert frames % 4 == 1
    assert latents_of_seconds(frames / fps, fps) == latents_num


@given(st.integers(1, 1000))
def test_each_way_to_give_the_length_agrees(latents_num: int) -> None:
    frames = frames_of_latents(latents_num)
    ways = ({"latents_num": latents_num}, {"num_frames": frames}, {"seconds": frames / 16})
    lengths = {complete(GenerationRequest(prompt="x", **way), PRESET).latents_num for way in ways}  # type: ignore[arg-type]
    assert lengths == {latents_num}


def test_everything_is_filled_from_the_preset() -> None:
    preset = Preset(
        seconds=9.8, height=96, width=64, fps=8, num_inference_steps=7, guidance_scale=2.5, flow_shift=4.0,
        num_per_block=6, num_cat=3, negative_prompt="ugly", model="Wan-AI/Some",
    )  # fmt: skip
    settings = complete(GenerationRequest(prompt="a fox", seed=5), preset)
    assert settings.model_dump() == {
        "prompt": "a fox", "negative_prompt": "ugly", "latents_num": 21, "height": 96, "width": 64, "fps": 8,
        "num_inference_steps": 7, "guidance_scale": 2.5, "guidance_scale_2": 2.5, "guidance_start": 0.0, "guidance_stop": 1.0,
        "boundary_ratio": None, "flow_shift": 4.0, "solver": "unipc", "seed": 5, "num_per_block": 6, "num_cat": 3,
        "schedule": "paper", "context": "recomputed", "chosen": "", "refresh": 9, "max_in_flight": 7, "stagger": 1,
        "left_context": "latest",
        "micro_batches": False, "cache_interval": 1, "cache_order": 1, "disable_cache_before_step": 3,
        "disable_cache_after_step": None, "model": "Wan-AI/Some", "shots": None, "start_image": None,
        "loras": (),
        "is_endless": False, "continue_from": None, "join": False, "ghost": 0, "num_frames_before": 0,
        "lead": 2.0, "fitted": "",
    }  # fmt: skip
    assert settings.num_frames == 81
    assert complete(settings.as_request(), preset) == settings
    other = complete(settings.as_request(), Preset())
    assert other == settings.model_copy(update={"model": ""}), "stored settings do not depend on the preset any more"


def test_a_field_is_written_once() -> None:
    lengths = {"num_frames", "seconds", "takes"}
    assert set(GenerationRequest.model_fields) == set(Settings.model_fields) - NOT_ASKED | lengths
    for name in set(GenerationRequest.model_fields) - lengths:
        assert GenerationRequest.model_fields[name].description == Settings.model_fields[name].description


def test_loras_are_a_list_of_names() -> None:
    assert GenerationRequest(prompt="x", loras=[" a:0.5 ", "high:b"]).loras == ("a:0.5", "high:b")
    assert GenerationRequest(prompt="x", loras=["none"]).loras == GenerationRequest(prompt="x", loras=[]).loras == ()
    for bad in ("a", [5], [""], ["a"] * 17, ["x" * 1001], ["a\0"], {"a": 1}, 5, [["a"]], True):
        assert refused(prompt="x", loras=bad).field == "loras"
    preset = Preset(loras=("a",))
    chosen = [complete(GenerationRequest(prompt="x", loras=given), preset).loras for given in (None, [], ["b"])]
    assert chosen == [("a",), (), ("b",)]
    assert complete(complete(GenerationRequest(prompt="x"), Preset()).as_request(), preset).loras == (), "stored is stored"


NONE_HAS_A_MEANING = {
    "boundary_ratio": "one expert",
    "disable_cache_after_step": "no such step",
    "shots": "one prompt throughout",
    "start_image": "no picture",
    "continue_from": "no film",
}


@pytest.mark.parametrize("field", Settings.model_fields)
def test_settings_are_never_none_without_a_meaning(field: str) -> None:
    settings = complete(GenerationRequest(prompt="x"), PRESET)
    assert (getattr(settings, field) is None) == (field in NONE_HAS_A_MEANING)
    if field not in NONE_HAS_A_MEANING:
        with pytest.raises(RequestError) as caught:
            Settings(**settings.model_dump() | {field: None})
        assert caught.value.field == field


def test_records_of_older_versions_are_read() -> None:
    """As 0.1.0 wrote them: nothing that was None, and the policy by its name alone."""
    old = {
        "prompt": "", "negative_prompt": "", "latents_num": 40, "height": 64, "width": 64, "fps": 16,
        "num_inference_steps": 20, "guidance_scale": 2.5, "guidance_scale_2": 2.5, "flow_shift": 3.0, "seed": 3,
        "num_per_block": 8, "num_cat": 4, "context": "cached",
    }  # fmt: skip
    paper = rules_of(restore({**old, "schedule": "paper", "micro_batches": False}))
    assert make_schedule(paper, BlockPlan.of(40, 8, 4), (0,) * 20) == make_schedule(
        Rules(context="cached"), BlockPlan.of(40, 8, 4), (0,) * 20
    )
    preview = restore({**old, "schedule": "preview", "max_in_flight": 3, "stagger": 7, "micro_batches": True})
    assert (preview.max_in_flight, preview.stagger, preview.left_context) == (3, 7, "own_step")
    for damage in ({"schedule": "zigzag"}, {"steps": 5}, {"height": None}):
        with pytest.raises(RequestError):
            restore({**old, "schedule": "paper", **damage})
    with pytest.raises(RequestError, match="schedule is missing: order in which blocks are denoised"):
        restore(old)


@pytest.mark.parametrize("interval", [None, 1])
def test_step_caching_is_off_unless_asked_for(interval: int | None) -> None:
    resolved = complete(GenerationRequest(prompt="x", cache_interval=interval), PRESET)
    assert rules_of(resolved).step_cache is None


def test_step_caching_stores_what_it_was_run_with() -> None:
    resolved = complete(GenerationRequest(prompt="x", cache_interval=2, num_inference_steps=20), PRESET)
    assert (resolved.cache_order, resolved.disable_cache_before_step, resolved.disable_cache_after_step) == (1, 3, None)
    assert rules_of(resolved).step_cache == StepCache(interval=2, max_order=1, before=3)
    own = {"cache_order": 0, "disable_cache_before_step": 1, "disable_cache_after_step": 0}
    given = complete(GenerationRequest(prompt="x", cache_interval=3, **own), PRESET)
    assert {name: getattr(given, name) for name in own} == own
    assert rules_of(given).step_cache == StepCache(interval=3, max_order=0, before=1, after=0)
    assert complete(given.as_request(), PRESET) == given


def test_own_values_win() -> None:
    own = {
        "prompt": "x", "negative_prompt": "", "latents_num": 3, "height": 32, "width": 48, "fps": 24,
        "num_inference_steps": 2, "guidance_scale": 0.0, "guidance_scale_2": 0.0, "flow_shift": 1.0, "seed": 0,
        "num_per_block": 2, "num_cat": 0, "schedule": "preview",
        "context": "cached", "max_in_flight": 1, "stagger": 2, "micro_batches": False,
    }  # fmt: skip
    resolved = complete(GenerationRequest(**own), Preset(negative_prompt="ugly"))
    assert resolved.model_dump().items() >= own.items(), "zero and the empty text are values"


def test_seed_is_drawn_once() -> None:
    seeds = {complete(GenerationRequest(prompt="x"), PRESET).seed for _ in range(5)}
    assert len(seeds) > 1
    assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)


def test_context_follows_a_shorter_block() -> None:
    assert complete(GenerationRequest(prompt="x", num_per_block=3), PRESET).num_cat == 3
    with pytest.raises(RequestError, match="use num_cat between 0 and 8"):
        complete(GenerationRequest(prompt="x", num_cat=9), PRESET)


def test_two_experts() -> None:
    request, preset = GenerationRequest(prompt="x", guidance_scale=6.0), Preset(guidance_scale_2=3.0, boundary_ratio=0.9)
    assert complete(request, preset, num_experts=2, boundary_ratio=0.5).boundary_ratio == 0.9
    assert complete(request, preset, num_experts=2).guidance_scale_2 == 3.0
    assert complete(request, Preset(), num_experts=2, boundary_ratio=0.5).boundary_ratio == 0.5
    assert complete(request, Preset(), num_experts=2, boundary_ratio=0.5).guidance_scale_2 == 6.0
    own = complete(GenerationRequest(prompt="x", boundary_ratio=0.0, guidance_scale_2=0.0), preset, num_experts=2)
    assert (own.boundary_ratio, own.guidance_scale_2) == (0.0, 0.0)
    assert complete(request, preset).boundary_ratio is None, "one expert has no boundary"
    with pytest.raises(RequestError, match=r"give boundary_ratio \(0\.875"):
        complete(request, Preset(), num_experts=2)


@pytest.mark.parametrize(
    ("values", "words", "field"),
    [
        ({"seconds": 11}, "177 frames (11.1 s) are more than this preset's limit of 160 frames (10 s)", "seconds"),
        ({"latents_num": 100}, "397 frames", "seconds"),
        ({"num_inference_steps": 21}, "num_inference_steps=21 is more than this preset's limit of 20", "num_inference_steps"),
        ({"num_per_block": 13}, "limit of 12", "num_per_block"),
        ({"height": 496}, "height=496 x width=832 is more than this preset's limit of 399360 pixels", "height"),
        ({"seconds": 25_000, "fps": 120}, "seconds=25000 is 750001 latent frames", "seconds"),
    ],
)
def test_limits(values: dict[str, object], words: str, field: str) -> None:
    preset = Preset(
        num_inference_steps=20, limits=Limits(seconds=10, num_inference_steps=20, num_per_block=12, pixels=480 * 832)
    )
    complete(GenerationRequest(prompt="x", seconds=10), preset)  # at the limit
    complete(GenerationRequest(prompt="x", num_per_block=12, height=832, width=480), preset)
    with pytest.raises(RequestError) as caught:
        complete(GenerationRequest(prompt="x", **values), preset)
    assert words in str(caught.value)
    assert caught.value.field == field


def test_json_round_trip() -> None:
    request = GenerationRequest(prompt="日本 \u2028 \"'\\", seed=MAX_SEED, flow_shift=0.1 + 0.2)
    assert GenerationRequest.from_json(request.to_json()) == request
    assert "日本" in request.to_json()
    assert set(json.loads(request.to_json())) == {"prompt", "seed", "flow_shift"}


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "5", "{", '{"prompt": 5}', "[" * 50_000, '{"prompt": "x", "seed": %s}' % ("1" * 9999)]
)
def test_json_of_strangers(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationRequest.from_json(text)
    assert "\n" not in str(caught.value)
