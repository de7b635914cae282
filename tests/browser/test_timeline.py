"""Films of shots on the page, in a real browser against the fake engine: typed, added, moved, made, and filled in again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.test_page import browser, playwright, pytestmark, server, shoot, visit, wait_state  # noqa: F401

TYPED = "a market in the rain\n[2s] a woman opens an umbrella\n[1.5s blend] she walks away"


def shots(page: Any) -> list[list[str]]:
    """What the controls show: seconds, how it begins, text."""
    return [
        [row.input_value() if row.is_enabled() else "" for row in item.locator(".secs, .how, .text").all()]
        for item in page.locator("#timeline li").all()
    ]  # fmt: skip


def test_shots_as_one_types(visit: Any) -> None:  # noqa: F811
    page = visit()
    page.fill("#prompt textarea", TYPED)
    page.wait_for_selector(".film .shot.blend")
    assert shots(page) == [["2", "", "a woman opens an umbrella"], ["1.5", "blend", "she walks away"]]
    assert page.get_attribute(".film", "aria-label") == "2 shots, 4 blocks, 3.6 s"
    page.fill("#prompt textarea", f"{TYPED}\n[1s fade] x")
    page.wait_for_function("document.querySelector('.estimate.bad')?.innerText.includes(\"'fade' is not known\")")
    page.fill("#prompt textarea", "a kite")
    page.wait_for_selector(".film", state="detached")
    page.wait_for_selector(".estimate:not(.bad) b")
    assert shots(page) == []


def test_shots_without_their_syntax(visit: Any) -> None:  # noqa: F811
    page = visit()
    page.fill("#prompt textarea", "a market in the rain")
    for seconds, text in (("2", "a woman opens an umbrella"), ("1.5", "she walks away"), ("1", "a puddle")):
        page.click(".add-shot")
        page.keyboard.type(text)
        page.fill("#timeline li:last-child .secs", seconds)
    page.select_option("#timeline li:nth-child(2) .how", "blend")
    page.select_option("#timeline li:nth-child(3) .how", "cut")
    assert page.input_value("#prompt textarea") == f"{TYPED}\n[1s cut] a puddle"
    page.wait_for_selector(".film .shot.cut")
    shoot(page, "timeline")
    page.focus("#timeline li:nth-child(3) .up")
    page.keyboard.press("Enter")
    page.click("#timeline li:nth-child(1) .gone")
    assert page.input_value("#prompt textarea") == "a market in the rain\n[1s cut] a puddle\n[1.5s blend] she walks away"


@pytest.mark.parametrize("width", [390, 1440])
def test_a_film_is_made_and_filled_in_again(visit: Any, width: int) -> None:  # noqa: F811
    page = visit(width=width)
    text = f"{TYPED}\n[1s cut] a puddle"
    page.fill("#prompt textarea", text)
    page.wait_for_selector(".film .shot.cut")
    page.click("#generate")
    wait_state(page, "finished")
    assert page.locator(".board .film-shots .shot").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    shoot(page, f"film-{width}", full_page=True)
    page.fill("#prompt textarea", "something else")
    page.wait_for_selector("#composer .film", state="detached")
    page.click("#gallery [data-do=reuse]")
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=text)
    page.wait_for_selector("#composer .film .shot.cut")
    assert len(shots(page)) == 3
