"""The page one stays in: what is typed is kept, a server that is away is told of, and all is within reach of the keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.test_page import ask, browser, pytestmark, server, shoot, visit, wait_state, wait_value  # noqa: F401
from tests.page_server import Server

# Names of what can be used: of itself, its label, its placeholder.
NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, a[href], [role=slider], [tabindex="0"]')]
  .filter((one) => one.checkVisibility() && one.type !== 'hidden' && !one.closest('footer'))
  .filter((one) => !one.ariaLabel && !one.title && !one.innerText?.trim() && !one.labels?.length)
  .map((one) => one.outerHTML.slice(0, 160))"""


def test_what_is_typed_survives(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    page.fill("#prompt textarea", "typed, and not yet asked for")
    page.fill("#seconds input[type=number]", "9")
    page.fill("#seed :is(input, textarea)", "4711")
    page.keyboard.press("Tab")
    page.wait_for_function("sessionStorage.getItem('dualparal-form')?.includes('4711')")
    visit.reload(page)
    wait_value(page, "#prompt textarea", "typed, and not yet asked for")
    wait_value(page, "#seed :is(input, textarea)", "4711")
    wait_value(page, "#seconds input[type=number]", "9")
    page.wait_for_function("document.querySelector('.estimate')?.innerText.includes('9.1 s')")
    assert visit().input_value("#prompt textarea") == "", "another visitor's form is empty"


def test_a_film_that_is_to_be_continued_survives(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    ask(page, "the first of two", 8)
    wait_state(page, "finished")
    job = str(page.get_attribute(".board", "data-job"))
    page.click("#gallery [data-do=extend]")
    wait_value(page, "#continue-from :is(input, textarea)", job)
    page.click("#join input")
    page.wait_for_function("JSON.parse(sessionStorage.getItem('dualparal-form')).values.join === false")
    visit.reload(page)
    wait_value(page, "#continue-from :is(input, textarea)", job)
    assert page.is_visible("#continue-from") and page.is_visible("#join") and not page.is_checked("#join input")
    page.fill("#continue-from :is(input, textarea)", "")
    page.keyboard.press("Tab")
    page.wait_for_function("JSON.parse(sessionStorage.getItem('dualparal-form')).values.continue_from === ''")
    visit.reload(page)
    wait_value(page, "#prompt textarea", "the first of two")
    assert not page.is_visible("#continue-from")


def test_the_title_tells_how_far_it_is(visit: Any, server: Server) -> None:  # noqa: F811
    server.groups.slow_at = 2
    page = visit()
    ask(page, "slow enough to be looked at", 12)
    page.wait_for_function("/^[1-9]\\d? % · DualParal Studio$/.test(document.title)")
    page.wait_for_selector("#video .next:not([hidden]) >> text=block 3 of 12 is next", state="attached")
    server.groups.let_go.set()
    wait_state(page, "finished")
    page.wait_for_function("document.title === '✓ DualParal Studio'")
    assert visit(like=page).title() == "DualParal Studio", "only what was seen at work is ticked"


def test_the_strip_by_keyboard(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    ask(page, "from block to block", 4)
    wait_state(page, "finished")
    page.wait_for_function("(v => v?.src.includes('video.mp4') && v.readyState > 1)(document.querySelector('#video video'))")
    page.wait_for_selector("#gallery li")  # the last word about the job has come
    page.focus(".strip")
    page.keyboard.press("End")
    page.wait_for_function(
        "Math.abs(document.querySelector('#video video').currentTime"
        " - Number([...document.querySelectorAll('.strip .block')].at(-1).dataset.from)) < 1.2"
    )
    assert "block 4" in str(page.get_attribute(".strip", "aria-valuetext"))
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize(("width", "height"), [(1024, 768), (390, 844), (720, 450)])  # the last: 1440 x 900 at 200 %
def test_generate_and_the_estimate_are_always_in_view(visit: Any, server: Server, width: int, height: int) -> None:  # noqa: F811
    page = visit(width=width, height=height)
    page.click("#advanced summary")
    for to in ("0", "document.body.scrollHeight / 4"):
        page.evaluate(f"scrollTo(0, {to})")
        for part in ("#generate", ".estimate b"):
            box = page.eval_on_selector(part, "(one) => { const b = one.getBoundingClientRect(); return [b.top, b.bottom]; }")
            assert box[0] >= 0 and box[1] <= height, (part, to, box)
    page.wait_for_function("document.querySelector('#dice').ariaLabel")
    assert page.evaluate(NAMELESS) == []
    shoot(page, f"studio-{width}")


def test_a_server_that_is_away(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    first = Server(tmp_path / "outputs")
    page = browser.new_context(viewport={"width": 1024, "height": 768}).new_page()
    page.set_default_timeout(240_000)
    page.goto(first.url)
    page.wait_for_selector(".estimate b")
    page.fill("#prompt textarea", "typed before the slow server went")
    first.groups.slow_at = 1
    page.keyboard.press("Control+Enter")
    wait_state(page, "running")
    first.close()
    page.wait_for_selector("#away >> text=The server does not answer")
    assert page.inner_text(".chip b") == "Server away"
    assert page.inner_text(".headline b") == "Waiting for the server"
    assert page.title() == "Server away · DualParal Studio"
    shoot(page, "away")
    again = Server(tmp_path / "outputs", port=int(first.url.rstrip("/").rpartition(":")[2]))
    page.wait_for_selector("#away", state="detached")
    wait_value(page, "#prompt textarea", "typed before the slow server went")
    page.wait_for_selector(".board.interrupted", state="attached")  # the job of before is on the stage again
    page.wait_for_selector(".chip.ready")
    page.context.close()
    again.close()


def test_a_server_that_still_answers_once_while_it_goes(browser: Any, server: Server) -> None:  # noqa: F811
    """A page opened anew from it would have nothing to show: neither ours nor Gradio's own reconnecting may do that."""
    asked: list[str] = []
    answers = iter([False, False, True, False, False])

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        if next(answers, True):
            route.fulfill(json={"status": "alive"}, headers={"X-Run": "still the same"})
        else:
            route.abort()

    page = browser.new_context(viewport={"width": 1024, "height": 768}).new_page()
    page.set_default_timeout(240_000)
    page.goto(server.url)
    page.wait_for_selector(".estimate b")
    server.groups.slow_at = 1
    ask(page, "a slow kite, looked at while the server goes", 12)
    wait_state(page, "running")
    page.evaluate("window.isOfBefore = true")
    page.context.route("**/healthz", answer)
    page.wait_for_selector("#away")
    page.evaluate("fetch('/gradio_api/app_id').catch(() => {})")  # as Gradio does
    while len(asked) < 5:
        page.wait_for_timeout(200)
    assert page.evaluate("window.isOfBefore && !!document.querySelector('.board')")
    with page.expect_event("load"):  # it answers twice: it is back
        pass
    page.wait_for_selector(".board.running", state="attached")
    assert not page.evaluate("window.isOfBefore") and page.locator("#away").count() == 0
    server.groups.let_go.set()
    wait_state(page, "finished")
    page.context.close()
