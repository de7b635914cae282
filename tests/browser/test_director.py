"""A film directed in the page, in a real browser over the fake engine: four shots, steered on the way, continued, joined, and
played to its end; what a page tells of a film without an end that it plays; and a film that goes on from an uploaded video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.jobs.job import Job
from dualparal.media.metadata import describe
from tests.browser.test_page import PLAYER, browser, job_of, playwright, pytestmark, visit, wait_state  # noqa: F401
from tests.conftest import wait_until
from tests.media.test_film import H264
from tests.media.test_film import made as made_video
from tests.page_server import PAGE_PRESET, Server

EARLY = PAGE_PRESET.model_copy(update={"schedule": "preview", "context": "cached"})
FOUR_SHOTS = "a slow market\n[1s] an umbrella\n[1s blend] a hand\n[1s cut] a puddle\n[20s] rain"
WAIT_S = 240


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "outputs", item_s=0.02, preset=EARLY)
    yield made
    made.close()


def frames_of(server: Server, job_id: str) -> int:
    return int(describe(server.engine.outputs / job_id / "video.mp4")["num_frames"])


def test_four_shots_steered_continued_joined_and_played_to_the_end(visit: Any, server: Server) -> None:  # noqa: F811
    page = visit()
    page.fill("#prompt textarea", FOUR_SHOTS)
    page.wait_for_function("document.querySelectorAll('#composer .film .shot').length === 4")
    server.groups.slow_at = 1  # it goes no further until it has been steered
    page.click("#generate")
    wait_state(page, "running")
    job = server.engine.job(job_of(page))
    assert job is not None
    page.fill("#steer-text textarea", "the sun comes out")
    page.click("#steer-go")
    # The fake may have come to a step at which it answers, or be held before one.
    assert wait_until(
        lambda: any(group.wishes for group in server.groups.groups) or "sun" in page.inner_text("#steered"), WAIT_S
    )
    server.groups.let_go.set()
    page.wait_for_selector("#steered >> text=the sun comes out")
    wait_state(page, "finished")
    first, shots = job.id, job.request.shots
    assert shots is not None and shots[-1].prompt == "the sun comes out"
    page.click("#result [data-do=extend]")
    page.wait_for_selector("#continue-from input", state="visible")
    page.fill("#prompt textarea", "night falls")
    page.fill("#seconds input[type=number]", "2")
    page.keyboard.press("Tab")
    page.wait_for_selector(".estimate:not(.bad) b")
    page.click("#generate")
    page.wait_for_function("job => document.querySelector('.board').dataset.job !== job", arg=first)
    wait_state(page, "finished")
    second = job_of(page)
    whole = frames_of(server, first) + server.engine.job(second).request.num_frames  # type: ignore[union-attr]
    assert frames_of(server, second) == whole
    page.wait_for_function(f"{PLAYER}.src.includes('video.mp4') && {PLAYER}.duration > {whole / 16 - 0.2}")
    page.evaluate(f"{PLAYER}.currentTime = 0, {PLAYER}.play()")
    page.wait_for_function(f"{PLAYER}.ended")


def test_a_page_tells_how_far_an_endless_film_is_played(
    visit: Any, server: Server, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    told: list[float] = []
    tell_played: Callable[[Job, float], None] = Job.tell_played

    def note(job: Job, seconds: float) -> None:
        told.append(seconds)
        tell_played(job, seconds)

    monkeypatch.setattr(Job, "tell_played", note)
    page = visit()
    page.fill("#prompt textarea", "a slow kite")
    page.click("#endless input")
    page.wait_for_selector(".estimate >> text=until it is finished or stopped")
    server.groups.slow_at = 3
    page.click("#generate")
    page.wait_for_function(f"{PLAYER} && {PLAYER}.currentTime > 0.5")
    assert wait_until(lambda: any(seconds > 0.5 for seconds in told), WAIT_S), told
    server.groups.let_go.set()
    page.click("#steer-finish")
    wait_state(page, "finished")


def test_from_a_video_of_ones_own(visit: Any, server: Server, tmp_path: Path) -> None:  # noqa: F811
    path = made_video(tmp_path / "a clip.mp4", *H264)
    page = visit()
    page.set_input_files("#continue-video input[type=file]", str(path))
    page.wait_for_selector("#continue-video table >> text=clip")
    page.fill("#prompt textarea", "a kite")
    page.wait_for_selector(".estimate:not(.bad) b")
    page.click("#generate")
    page.wait_for_selector(".board .notice >> text=scaled and cropped to 96 x 96")
    wait_state(page, "finished")
    page.locator("#gallery [data-do=reuse]").first.click()
    page.wait_for_selector("#continue-video >> text=give it again", state="attached")
