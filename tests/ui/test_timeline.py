"""The timeline's HTML and the form with shots: what they say, how long the film is, and nothing unescaped."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dualparal.errors import RequestError
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.ui import form, panels, timeline
from dualparal.ui.form import NAMES
from dualparal.ui.studio import Studio
from tests.fake_group import Make
from tests.page_server import ON_PAGE
from tests.settings import settings

FILM = "a market\n[2s] a <b>woman</b>\n[1.5s blend] she walks\n[2s cut]"


@pytest.fixture
def studio(make: Make) -> Studio:
    return Studio(make(**ON_PAGE).start())


def shown(studio: Studio, prompt: str) -> dict[str, Any]:
    """The form filled with a request's settings, as values by name."""
    updates = form.fill(studio, GenerationRequest(prompt=prompt, seed=3))
    return {name: update["value"] for name, update in zip(NAMES, updates, strict=True)}


def test_the_strip() -> None:
    film = settings(prompt=FILM, fps=16, num_per_block=8, num_cat=4)
    html = timeline.preview(film)
    assert "<b>woman" not in html and "a &lt;b&gt;woman&lt;/b&gt;" in html
    widths = [int(width) for width in re.findall(r'class="shot \w+" style="flex-grow:(\d+)"', html)]
    blocks = [int(width) for width in re.findall(r'<i class="\w*" style="flex-grow:(\d+)"', html)]
    assert sum(widths) == sum(blocks) == film.num_frames
    assert re.findall(r'class="shot (\w+)"', html) == ["first", "blend", "cut"]
    assert html.count('<i class="cut"') == 1
    assert 'title="shot 2, 2.1 to 3.6 s, the text changes over three blocks: she walks"' in html
    assert 'title="shot 3, 3.6 to 5.6 s, a cut: a new scene: what the whole film shows"' in html
    assert timeline.preview(settings(seconds=3)) == timeline.shots_row(settings(seconds=3)) == ""


def test_the_form_reads_what_it_shows(studio: Studio) -> None:
    values = shown(studio, FILM)
    assert values["prompt"] == FILM
    again = form.read(studio, [values[name] for name in NAMES])
    assert again == values["stored"]
    for prompt, shots in (("[3s] x", 1), ("x\n[3s] y\n[3s cut] z", 2)):
        read = form.read(studio, [{**values, "prompt": prompt}[name] for name in NAMES])
        assert len(read.shots) == shots
        assert read.seed == 3, "all but the shots is as it was"


def test_without_a_timeline_the_slider_says_how_long(studio: Studio) -> None:
    values = shown(studio, FILM)
    plain = form.read(studio, [{**values, "prompt": "a kite"}[name] for name in NAMES])
    assert (plain.shots, plain.prompt, plain.num_frames) == (None, "a kite", 4 * round(values["seconds"] * plain.fps / 4) + 1)
    typed = form.read(studio, [{**shown(studio, "a kite"), "prompt": FILM, "seconds": 100}[name] for name in NAMES])
    assert typed.num_frames == settings(prompt=FILM, fps=typed.fps).num_frames


def test_a_wrong_shot_is_told(studio: Studio) -> None:
    values = shown(studio, FILM)
    with pytest.raises(RequestError, match="shots: shot 1: 'fade' is not known"):
        form.read(studio, [{**values, "prompt": "[3s fade] x"}[name] for name in NAMES])


def test_a_made_film_shows_its_shots(studio: Studio) -> None:
    found = studio.submit(GenerationRequest(prompt=FILM, num_inference_steps=1), owner="me")
    html = panels.board(found, studio)
    assert html.count('class="shot ') == 3
    assert "a market · a &lt;b&gt;woman&lt;/b&gt; · she walks" in html
    assert not studio.can_compare(found)


def test_the_limit_of_a_preset_is_of_the_film() -> None:
    from dualparal.presets import complete

    with pytest.raises(RequestError, match=r"are more than this preset's limit of 4800 frames"):
        complete(GenerationRequest(prompt="[200s] x\n[200s cut] y"), Preset())
