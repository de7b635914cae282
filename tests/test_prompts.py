"""Shots: as a list or as lines of the prompt, checked with a sentence that names the one which is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.prompts import MAX_PROMPT_CHARS, MAX_SHOTS, MAX_TIMELINE_BYTES, Shot, join_timeline, split_timeline
from dualparal.request import GenerationRequest, Settings
from tests.settings import settings

A, B = {"prompt": "a", "seconds": 8}, {"prompt": "b", "latents_num": 9, "transition": "cut"}


def refused(**values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        GenerationRequest(**values)
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 400
    assert "pydantic" not in text
    return text


def test_a_list_of_shots() -> None:
    request = GenerationRequest(prompt="x", shots=[A, B])
    assert request.shots == (Shot(prompt="a", seconds=8), Shot(prompt="b", latents_num=9, transition="cut"))
    assert GenerationRequest(shots=[A]).prompt == "", "the shots say it all"
    assert GenerationRequest(prompt="x", shots=[{"seconds": 3}]).shots == (Shot(seconds=3),)
    assert GenerationRequest(prompt="x", shots=request.shots) == request


@pytest.mark.parametrize(
    ("shots", "sentence"),
    [
        ([], "must be a list of one or more shots"),
        ("[8s] a", "must be a list of one or more shots"),
        ([A, 5], "shot 2 is a int"),
        ([A, {"prompt": "b"}], "shot 2 has no length"),
        ([A, {**B, "seconds": 3}], "shot 2 has seconds and latents_num, which both give its length"),
        ([A, {**A, "seconds": 0}], "shot 2: seconds=0: should be greater than 0"),
        ([A, {**A, "seconds": float("nan")}], "shot 2: seconds=nan"),
        ([A, {**A, "seconds": True}], "shot 2: seconds=True: true and false are not"),
        ([A, {**A, "seconds": 10**5000}], "shot 2: seconds="),
        ([A, A, {**B, "latents_num": 0}], "shot 3: latents_num=0"),
        ([{**A, "prompt": 5}], "shot 1: prompt=5: should be a valid string"),
        ([{**A, "prompt": "x" * (MAX_PROMPT_CHARS + 1)}], "shot 1: prompt='xxx"),
        ([{**A, "prompt": "x\n[3s] y"}], "shot 1: prompt='x\\n[3s] y': a line of it begins with a number in brackets"),
        ([{**A, "transition": "fade"}], "shot 1: transition='fade': should be 'switch', 'blend' or 'cut'"),
        ([A, {**A, "length": 3}], "shot 2 has a field 'length'; a shot has prompt, seconds, latents_num, transition"),
        ([A] * (MAX_SHOTS + 1), "201 shots are too many; the limit is 200"),
        ([{**A, "prompt": "x" * 4000}] * 13, "52000 bytes of text are too many; the limit of a timeline is 48000"),
        ([{**A, "prompt": "\ud800"}], "shot 1: prompt='\\ud800': half a surrogate pair"),
    ],
)  # fmt: skip
def test_wrong_shots_are_named(shots: Any, sentence: str) -> None:
    assert refused(prompt="x", shots=shots).startswith(f"shots: {sentence}")


def test_a_shot_says_something() -> None:
    assert "shot 2 says nothing, and neither does the film's prompt" in refused(prompt=" ", shots=[A, {"seconds": 2}])
    assert "shot 2 says nothing" in refused(prompt="[2s] a\n[3s cut]")


@pytest.mark.parametrize("length", [{"seconds": 5}, {"latents_num": 9}, {"num_frames": 9}])
def test_the_shots_are_the_length(length: dict[str, Any]) -> None:
    name = next(iter(length))
    assert refused(prompt="x", shots=[A], **length) == f"{name} and the shots both give the length; leave {name} out"
    assert "both give the length" in refused(prompt="[8s] a", **length)


# As text

TIMELINE = """a market in the rain

[8s] a woman
opens an umbrella
  [ 2.5S Blend ] she walks away
[4s cut]
[1s switch]"""


def test_lines_that_begin_with_a_duration() -> None:
    assert split_timeline(TIMELINE) == ("a market in the rain", [
        {"seconds": 8.0, "transition": "switch", "prompt": "a woman\nopens an umbrella"},
        {"seconds": 2.5, "transition": "blend", "prompt": "she walks away"},
        {"seconds": 4.0, "transition": "cut", "prompt": ""},
        {"seconds": 1.0, "transition": "switch", "prompt": ""},
    ])  # fmt: skip
    as_list = GenerationRequest(prompt="a market in the rain", shots=split_timeline(TIMELINE)[1])
    assert GenerationRequest(prompt=TIMELINE) == GenerationRequest(prompt=TIMELINE.replace("\n", "\r\n")) == as_list
    assert GenerationRequest(prompt=TIMELINE.replace("\n", "\r")) == as_list


@pytest.mark.parametrize(
    "text", ["a [8s] b", "[red] a", "[a 8s] b", "(8s) a", "8s a", "[8s a", "[ ] a", "[.5s] a", "[\n8s] a", "a\n - [8s] b"]
)
def test_other_brackets_are_text(text: str) -> None:
    request = GenerationRequest(prompt=text)
    assert (request.prompt, request.shots) == (text, None)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[8] b", "shot 2 begins with '[8]', which is no duration; write [8s], [8s cut] or [8s blend] before a shot's text"),
        ("[8k] b", "shot 2 begins with '[8k]', which is no duration"),
        ("[8 min] b", "shot 2 begins with '[8 min]', which is no duration"),
        ("[8scut] b", "shot 2 begins with '[8scut]'"),
        ("[8s fade] b", "shot 2: 'fade' is not known; after the duration there may be switch, blend or cut"),
        ("[8s cut slow] b", "shot 2: 'slow' is not known"),
        ("[8s cut blend] b", "shot 2 has cut and blend; after the duration there may be one of switch, blend or cut"),
        ("[0s] b", "shot 2: seconds=0.0: should be greater than 0"),
        ("[99999s] b", "shot 2: seconds=99999.0"),
        ("[" + "9" * 400 + "s] b", "shot 2 begins with '[999"),
        ("[8s] " + "x" * 4001, "shot 2: prompt='xxx"),
    ],
)
def test_lines_that_are_no_shots_are_told(line: str, sentence: str) -> None:
    assert refused(prompt=f"x\n[3s] a\n{line}").startswith(f"shots: {sentence}")


def test_how_much_text() -> None:
    assert "48003 bytes of text are too many" in refused(prompt="[8s] " + "é" * 23_999)
    assert "201 shots are too many" in refused(prompt="[1s] a\n" * 201)
    longest = "x" * 4000 + ("\n[1s] " + "y" * 213) * 200
    assert len(longest) < MAX_TIMELINE_BYTES
    assert len(GenerationRequest(prompt=longest).shots) == 200
    assert "are too many; the limit is 4000" in refused(prompt="x" * 4001 + "\n[8s] a")


def test_shots_are_given_once() -> None:
    assert refused(prompt="[8s] a", shots=[A]) == "shots are given and written in the prompt; give them once"


words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="["), max_size=8).map(str.strip)


@given(
    words,
    st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from(["switch", "blend", "cut"]), words), min_size=1, max_size=5),
)
def test_joined_and_split_again(prompt: str, shots: list[tuple[int, str, str]]) -> None:
    given = [(milliseconds / 1000, how, text) for milliseconds, how, text in shots]
    found, again = split_timeline(join_timeline(prompt, given))
    assert found == prompt
    assert [(shot["seconds"], shot["transition"], shot["prompt"]) for shot in again] == given


# Completed


def test_settings_are_stored_and_asked_for_again() -> None:
    film = settings(prompt=TIMELINE, fps=16)
    assert [(shot.latents_num, shot.seconds) for shot in film.shots] == [(33, None), (10, None), (17, None), (4, None)]
    assert film.latents_num == 64
    stored = film.to_json()
    assert Settings(**json.loads(stored)) == film
    assert settings(**GenerationRequest.from_json(stored).model_dump(exclude_none=True)) == film
    assert settings(**film.as_request().model_dump(exclude_none=True)) == film
    assert film.all_text == "a market in the rain · a woman\nopens an umbrella · she walks away"


def test_without_shots_nothing_is_stored() -> None:
    assert "shots" not in json.loads(settings(seconds=3).to_json())


@pytest.mark.parametrize("change", [{"latents_num": 30}, {"shots": [A]}])
def test_settings_that_do_not_agree(change: dict[str, Any]) -> None:
    film = settings(shots=[{**A, "seconds": 2}, B])
    with pytest.raises(RequestError, match="shots: they are not the"):
        Settings(**film.model_dump() | change)
