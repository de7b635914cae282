"""What is typed survives a reload: how the page reads what the browser kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dualparal.ui import draft, form
from dualparal.ui.page import Page
from dualparal.ui.studio import Studio
from tests.page_server import GRADIO_WARNINGS, PAGE_PRESET
from tests.ui.test_parts import engine, made, studio  # noqa: F401

pytestmark = GRADIO_WARNINGS


def kept(of: str = "pocket", **values: Any) -> str:
    return json.dumps({"of": of, "values": values})


def test_the_estimate_is_of_what_was_typed(studio: Studio) -> None:  # noqa: F811
    page, defaults = Page(studio), form.defaults(PAGE_PRESET)
    values = draft.values_of(kept(prompt="a kite", seconds=12), "pocket", defaults)
    assert values is not None and len(values) == len(form.NAMES)
    assert form.read(studio, values).prompt == "a kite"
    assert "12.1</b> s" in page._estimate(*values)[0]
    bad = draft.values_of(kept(seconds=-5), "pocket", defaults)
    assert bad is not None and "more than 0 seconds" in page._estimate(*bad)[0]


def test_a_film_that_is_to_be_continued_is_kept(studio: Studio) -> None:  # noqa: F811
    film, defaults = made(studio, seconds=8, num_inference_steps=2), form.defaults(PAGE_PRESET)
    values = draft.values_of(kept(prompt="and on", continue_from=film.job_id, join=False), "pocket", defaults)
    assert values is not None
    read = form.read(studio, values)
    assert read.continue_from == film.job_id and read.join is False
    for nonsense in (3, ["x"], {"a": 1}, "../../etc"):
        values = draft.values_of(kept(prompt="and on", continue_from=nonsense), "pocket", defaults)
        assert values is not None and "estimate" in Page(studio)._estimate(*values)[0]


@pytest.mark.parametrize(
    "text", ["", None, "{", "[]", '"x"', "null", kept("another"), json.dumps({"of": "pocket", "values": 3})]
)
def test_what_is_no_draft_is_left(text: object) -> None:
    assert draft.values_of(text, "pocket", {}) is None


def test_a_form_that_nobody_touched_asks_for_the_presets_values(studio: Studio) -> None:  # noqa: F811
    shown = {
        **form.defaults(PAGE_PRESET),
        "prompt": "a kite",
        "stored": None,
        "start_image": None,
        "continue_video": None,
        "seed": "7",
    }
    read = form.read(studio, [shown[name] for name in form.NAMES])
    assert read.model_copy(update={"chosen": ""}) == studio.resolve(
        form.GenerationRequest(prompt="a kite", seed=7, fps=PAGE_PRESET.fps)
    ).model_copy(update={"chosen": ""})
