"""Clicks that nobody meant, or whose ground has gone: halves of double clicks, files that are no videos, deleted videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualparal.jobs.folder import list_jobs
from tests.browser.test_page import ask, browser, job_of, pytestmark, server, visit, wait_state, wait_value  # noqa: F401
from tests.page_server import Server


def test_a_double_click_makes_one_video(visit: Any, server: Server) -> None:  # noqa: F811
    server.groups.slow_at = 1
    page = visit()
    page.fill("#prompt textarea", "slow, and asked for once")
    page.dblclick("#generate")
    wait_state(page, "running")
    page.focus("#prompt textarea")
    page.keyboard.press("Control+Enter")  # meant, and by keyboard
    page.wait_for_selector("#queue li >> nth=1")
    assert len(list(list_jobs(server.engine.outputs))) == 2
    server.groups.let_go.set()


def test_a_wrong_file_makes_room_for_the_right_one(visit: Any, server: Server, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "other.mp4").write_bytes(b"\0" * 5000)
    page = visit()
    page.set_input_files("#restore input[type=file]", tmp_path / "other.mp4")
    page.wait_for_selector("text=is not a video made here")
    page.wait_for_selector("#restore input[type=file]", state="attached")
    video = server.client.predict(prompt="the right one", seconds=1, api_name="/generate")[0]
    page.set_input_files("#restore input[type=file]", video["video"] if isinstance(video, dict) else video)
    wait_value(page, "#prompt textarea", "the right one")


def test_deleting_the_video_on_the_stage_empties_it(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    ask(page, "soon gone", 1)
    wait_state(page, "finished")
    page.wait_for_selector("#gallery li")
    page.click("#gallery [data-do=remove]")
    page.wait_for_selector("#result .download", state="detached")
    page.wait_for_selector(".board", state="detached")
    page.wait_for_selector(".example")
    assert not list(list_jobs(server.engine.outputs))
