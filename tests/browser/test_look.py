"""The early look in the browser, with real workers and the pocket model: the stage is never black while there is no video."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dualparal.model.source import POCKET_WEIGHTS
from tests.browser.test_page import PLAYER, ask, browser, shoot, wait_state  # noqa: F401
from tests.browser.test_real_engine import Served, set_steps
from tests.page_server import GRADIO_WARNINGS

pytestmark = [*GRADIO_WARNINGS, pytest.mark.slow, pytest.mark.timeout(2400)]
IS_ROUGH = "document.querySelector('.rough:not([hidden]):not(.waiting) canvas')"
# Mean and spread of a canvas's brightness.
LIGHT = """(canvas) => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const values = [];
  for (let i = 0; i < data.length; i += 4) values.push((data[i] + data[i + 1] + data[i + 2]) / 3);
  const [sum, least, most] = values.reduce(
    ([a, b, c], x) => [a + x, Math.min(b, x), Math.max(c, x)], [0, Infinity, -Infinity]);
  return [sum / values.length, most - least];
}"""


class Patient(Served):
    def wait(self, condition: Callable[[], Any], timeout_s: float = 900) -> Any:
        return super().wait(condition, timeout_s)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with contextlib.closing(Patient(tmp_path_factory.mktemp("served"), POCKET_WEIGHTS)) as made:
        yield made


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(600_000)
    problems: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: message.type == "error" and problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(served.url)
    opened.wait_for_selector(".estimate b")
    yield opened
    context.close()
    assert problems == [], problems
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == [], (
        "all comes from the server itself"
    )


def test_rough_from_the_first_steps_until_the_video_plays(page: Any, served: Served) -> None:
    set_steps(page, 60)
    known = served.jobs()
    ask(page, "a red circle bouncing on a white background", 12)
    with served.held_within(known, "look/0001.jpg"):  # block 0's very first looks are nearly its background alone
        page.wait_for_function("document.querySelector('.rough:not([hidden])')")
        assert page.inner_text(".rough button"), "something is said before the first look"
        page.wait_for_function(  # a picture, not black and not of one colour
            rf"""() => {{
                const said = /rough, step \d+ of 60/.test(document.querySelector('.rough button')?.innerText);
                const canvas = {IS_ROUGH};
                const [mean, spread] = canvas ? ({LIGHT})(canvas) : [0, 0];
                return said && mean > 40 && spread > 15;
            }}"""
        )
        shoot(page, "rough")
    page.wait_for_function("document.querySelectorAll('.block.looked canvas').length > 1")
    assert page.eval_on_selector(".block.looked canvas", LIGHT)[0] > 40
    page.wait_for_selector(".block.ready", state="attached")
    page.wait_for_function(f"{PLAYER} && {PLAYER}.currentTime > 0.2 && document.querySelector('.rough').hidden")
    wait_state(page, "finished")
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && document.querySelector('.rough').hidden")
    assert page.locator(".strip .block.ready.looked canvas").count() == page.locator(".strip .block").count() > 1
    shoot(page, "rough-done")


def test_the_rough_film_can_be_held_and_loops(page: Any, served: Served) -> None:
    set_steps(page, 60)
    known = served.jobs()
    ask(page, "a green square moving right on a grey background", 60)
    with served.held_within(known, "look/*.jpg"):
        page.wait_for_function(IS_ROUGH)
        page.dispatch_event(".rough button", "click")
        assert page.inner_text(".rough button").endswith("paused")
        page.dispatch_event(".rough button", "click")
        place = "Number(getComputedStyle(document.querySelector('.strip')).getPropertyValue('--playhead'))"
        page.wait_for_function(f"(window.most = Math.max(window.most ?? 0, {place})) > 0 && {place} < window.most")
        for width, height, name in ((390, 844, "phone"), (1024, 768, "small")):
            page.set_viewport_size({"width": width, "height": height})
            page.locator("#stage").scroll_into_view_if_needed()
            shoot(page, f"rough-{name}")
        page.set_viewport_size({"width": 1440, "height": 900})
        page.dispatch_event("#stop", "click")
    wait_state(page, "cancelled")


def test_stop_and_try_another_seed(page: Any, served: Served) -> None:
    set_steps(page, 60)
    known = served.jobs()
    ask(page, "a blue circle bouncing on a white background", 60, seed="7")
    with served.held_within(known, "look/*.jpg") as first:
        page.wait_for_function(IS_ROUGH)
        assert page.inner_text("#another") == "Stop, try another seed"
        page.dispatch_event("#another", "click")
        served.wait((served.folder / "outputs" / first / ".stop").exists)
    with served.held_within({*known, first}, "look/*.jpg") as second:
        page.wait_for_function(f"document.querySelector('.board')?.dataset.job === '{second}'")
        page.wait_for_function(IS_ROUGH)
        page.wait_for_function("document.querySelector('#seed :is(input, textarea)').value !== '7'")
        page.dispatch_event("#stop", "click")
    assert "cancelled" in (served.folder / "outputs" / first / "events.jsonl").read_text().lower()
    asked = [(served.folder / "outputs" / job / "request.json").read_text() for job in (first, second)]
    seeds = [int(re.search(r'"seed": (\d+)', text)[1]) for text in asked]  # type: ignore[index]
    assert seeds[0] == 7 and seeds[1] != 7 and all("a blue circle" in text for text in asked)
    wait_state(page, "cancelled")
