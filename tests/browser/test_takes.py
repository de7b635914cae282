"""Takes on the page: asked for at once, seen side by side, and one is gone on with."""

from __future__ import annotations

from typing import Any

from dualparal.jobs.folder import list_jobs
from tests.browser.test_page import browser, pytestmark, server, shoot, visit, wait_state  # noqa: F401
from tests.page_server import Server


def test_four_takes_and_one_is_chosen(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    page.fill("#prompt textarea", "a lantern, four times")
    page.fill("#seed :is(input, textarea)", "21")
    page.click("#takes input")
    page.click("#takes >> text=× 4")
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('.wall [data-do=resume]').length === 4")
    assert page.locator("#queue li").count() == 0
    assert [found[:7] for found in page.locator(".wall li b").all_inner_texts()] == [f"seed {n}" for n in (21, 22, 23, 24)]
    shoot(page, "takes", full_page=True)
    page.click(".wall li:nth-child(3) [data-do=resume]")
    wait_state(page, "finished")
    page.wait_for_function("document.querySelectorAll('.wall [data-do=resume]').length === 3")
    page.click(".wall li:nth-child(1) [data-do=remove]")
    page.wait_for_function("document.querySelectorAll('.wall li').length === 3")
    assert len(list(list_jobs(server.engine.outputs))) == 3
