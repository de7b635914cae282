"""What one click costs: whoever asks, a request is completed once and planned once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.engine import setup
from dualparal.request import GenerationRequest
from dualparal.ui import form
from dualparal.ui.api import Calls
from dualparal.ui.page import Page
from dualparal.ui.studio import Studio
from tests.fake_group import Make
from tests.page_server import GRADIO_WARNINGS

pytestmark = GRADIO_WARNINGS
SECONDS = 30.0
SMALL = {"seconds": 1.0, "width": 32, "height": 32, "num_inference_steps": 2}
NOBODY: Any = SimpleNamespace(username=None, headers={}, client=SimpleNamespace(host="127.0.0.1"), session_hash="x")


@pytest.fixture
def studio(make: Make) -> Studio:
    return Studio(make().start())


@pytest.fixture
def counts(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine has settled and planned anything since it was there."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(setup, name)

        def call(*values: Any, **named: Any) -> Any:
            found[name] += 1
            return real(*values, **named)

        return call

    for name in ("settle", "plan_job"):
        monkeypatch.setattr(setup, name, counted(name))
    return found


def form_values(studio: Studio, **changes: Any) -> list[Any]:
    at = form.ranges(studio.engine.preset)
    values = {name: at[name]["value"] for name in at} | {name: getattr(studio.engine.preset, name) for name in form.CHOICES}
    values |= {"prompt": "a kite", "negative_prompt": "", "preset": studio.engine.preset.name, "seed": ""}
    values |= {
        "pace": 0,
        "start_image": None,
        "continue_video": None,
        "loras": [],
        "continue_from": "",
        "join": True,
        "is_endless": False,
    }
    values |= {"stored": None, **SMALL, **changes}
    return [values[name] for name in form.NAMES]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_generate_on_the_page(studio: Studio, counts: Counter[str], place: int) -> None:
    page = Page(studio)
    job_id, _ = page._start(NOBODY, "a token", *form_values(studio, pace=place))
    assert counts == {"settle": 1, "plan_job": 1}
    job = studio.engine.job(job_id)
    assert job is not None and job.result(SECONDS)
    assert job.folder.request() == job.request, "what is stored is what was made"


def test_use_settings_and_generate_again(studio: Studio, counts: Counter[str]) -> None:
    job = studio.engine.submit(GenerationRequest(prompt="x", latents_num=4, height=32, width=32, num_inference_steps=2))
    job.result(SECONDS)
    counts.clear()
    values = [update["value"] for update in form.fill(studio, job.request.as_request())]
    assert counts == {"settle": 1}
    counts.clear()
    again, _ = Page(studio)._start(NOBODY, "a token", *values)
    assert counts == {"settle": 1, "plan_job": 1}
    by_hand = job.request.model_copy(update={"chosen": ""})
    assert studio.engine.job(again).request == by_hand  # type: ignore[union-attr]


def test_a_call_of_the_api(studio: Studio, counts: Counter[str]) -> None:
    reported = Calls(studio).submit(NOBODY, None, None, prompt="a kite", latents_num=4, height=32, width=32)
    assert counts["settle"] == 1 and counts["plan_job"] <= 1 + (reported["state"] == "queued")
    studio.engine.job(reported["job_id"]).result(SECONDS)  # type: ignore[union-attr]


def test_a_submitted_request(studio: Studio, counts: Counter[str]) -> None:
    request = GenerationRequest(prompt="x", latents_num=4, height=32, width=32, num_inference_steps=2)
    settings = studio.engine.resolve(request)
    studio.engine.submit(settings).result(SECONDS)
    assert counts == {"settle": 1, "plan_job": 1}, "settings are complete as they are"


@pytest.mark.parametrize("prompt", ["", " \n", "\r"])
def test_nobody_takes_an_empty_prompt(studio: Studio, prompt: str) -> None:
    for ask in (
        lambda: Page(studio)._start(NOBODY, "a token", *form_values(studio, prompt=prompt)),
        lambda: Calls(studio).submit(NOBODY, None, None, prompt=prompt),
        lambda: studio.engine.submit(GenerationRequest(prompt=prompt)),
    ):
        with pytest.raises(Exception, match="the prompt is empty; say what the video should show"):
            ask()
    assert studio.engine.jobs() == []
