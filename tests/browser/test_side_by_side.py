"""Finished videos side by side, in a real browser: chosen by keyboard, one playhead, loop, and a wipe for two."""

from __future__ import annotations

from typing import Any

from dualparal.jobs.folder import list_jobs
from dualparal.request import GenerationRequest
from tests.browser.test_page import ask, browser, pytestmark, server, shoot, visit, wait_state  # noqa: F401
from tests.browser.test_studio import NAMELESS
from tests.page_server import Server

TIMES = "[...document.querySelectorAll('.side-by-side video')].map((one) => one.currentTime)"


def choose(page: Any, *places: int) -> None:
    """Videos of the gallery, the newest is 0, by keyboard."""
    for place in places:
        page.locator("#gallery [data-pick]").nth(place).focus()
        page.keyboard.press("Space")
    page.locator("#gallery [data-do=side]").focus()
    page.keyboard.press("Enter")


def made(page: Any, server: Server, *seconds: float) -> None:  # noqa: F811
    """Videos in the visitor's gallery: the first through the page, which tells whose they are."""
    ask(page, "the first of them", seconds[0])
    wait_state(page, "finished")
    page.wait_for_selector("#gallery [data-pick]")
    (first,) = list_jobs(server.engine.outputs)
    for number, length in enumerate(seconds[1:], 2):
        job = server.engine.submit(GenerationRequest(prompt=f"number {number}", seconds=length), owner=first.owner())
        job.result(timeout=240)
    page.wait_for_function(f"document.querySelectorAll('#gallery [data-pick]').length === {len(seconds)}")


def test_two_videos_one_playhead_and_a_wipe(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    made(page, server, 4, 6)
    choose(page, 0, 1)
    page.wait_for_function(f"{TIMES}.length === 2 && {TIMES}.every((time) => time > 0.3)")
    assert page.evaluate("document.activeElement.className") == "play" and page.evaluate(NAMELESS) == []
    page.keyboard.press("Enter")  # pause
    page.wait_for_selector(".side-by-side .play >> text=Play")
    page.focus(".side-by-side .place")
    page.keyboard.press("Home")
    page.wait_for_function(f"Math.max(...{TIMES}) === 0")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"(([a, b]) => a > 0 && Math.abs(a - b) < 0.03)({TIMES})")
    page.keyboard.press("End")  # the shorter one rests on its last picture
    page.wait_for_function(f"(([a, b]) => a > 5.9 && b > 3.9 && b < 4.1)({TIMES})")
    page.click(".side-by-side .play")  # and begins anew, by its loop
    page.wait_for_function(f"(([a, b]) => a > 0.2 && a < 4 && Math.abs(a - b) < 0.3)({TIMES})")
    shoot(page, "side-by-side", full_page=True)
    page.check(".side-by-side .wipe")
    page.focus(".wipe-at input")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.side-by-side').style.getPropertyValue('--wipe') === '0.6'")
    boxes = page.evaluate("[...document.querySelectorAll('.side-by-side .frame')].map((one) => one.getBoundingClientRect().x)")
    assert boxes[0] == boxes[1], "one over the other"
    frame = page.locator(".side-by-side .frame").nth(1).bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 4, frame["y"] + 20)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("Math.abs(document.querySelector('.side-by-side').style.getPropertyValue('--wipe') - 0.25) < 0.02")
    shoot(page, "side-by-side-wipe", full_page=True)
    page.click(".side-by-side .close")
    page.wait_for_selector(".side-by-side", state="detached")


def test_at_most_four_and_what_is_chosen_stays(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit(width=390, height=844, dark=True)
    made(page, server, 1, 1, 1, 1, 1)
    page.locator("#gallery [data-pick]").nth(0).check()
    page.wait_for_selector("#gallery .picked >> text=choose another")
    assert not page.locator("#gallery [data-do=side]").is_visible()
    for place in (1, 2, 3):
        page.locator("#gallery [data-pick]").nth(place).check()
    assert page.locator("#gallery [data-pick]").nth(4).is_disabled()
    page.fill("#search :is(input, textarea)", "number")  # the gallery is made anew
    page.wait_for_selector("#gallery >> text=4 of 5")
    page.wait_for_function("document.querySelectorAll('#gallery [data-pick]:checked').length === 4")
    page.locator("#gallery [data-do=side]").click()
    page.wait_for_function(f"{TIMES}.length === 4 && {TIMES}.every((time) => time > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, "side-by-side-phone", full_page=True)
    page.locator("#gallery [data-do=unpick]").click()
    assert page.locator("#gallery [data-pick]:checked").count() == 0 and page.locator("#gallery .picked").is_hidden()
