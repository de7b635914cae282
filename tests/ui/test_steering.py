"""Steering from the page and over the API, over fake workers: what it says, what it shows, whose job it may be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal import RequestError, Steered
from dualparal.jobs.folder import JobFolder
from dualparal.method.rules import plan_of
from dualparal.method.timeline import written
from dualparal.presets import complete
from dualparal.request import GenerationRequest
from dualparal.ui import charts, form, panels, timeline
from dualparal.ui.api import Calls
from dualparal.ui.page import Page
from dualparal.ui.studio import Studio
from tests.conftest import wait_until
from tests.fake_group import GroupLog, Make
from tests.page_server import ON_PAGE, PAGE_PRESET

HTTP: Any = SimpleNamespace(username=None, client=None, session_hash="tab")
OWNER = "someone's own secret"
FILM = {
    "prompt": "a slow kite",
    "seconds": 8,
    "num_inference_steps": 4,
    "max_in_flight": 2,
    "schedule": "preview",
    "context": "cached",
}


@pytest.fixture
def studio(make: Make, group_log: GroupLog, tmp_path: Path) -> Iterator[Studio]:
    yield Studio(make(**ON_PAGE, outputs=tmp_path / "outputs").start())
    group_log.let_go.set()


def running(studio: Studio) -> str:
    """A job that goes no further than two finished blocks."""
    token = studio.owner_of(OWNER)
    job_id = studio.submit(GenerationRequest(**FILM), owner=token).job_id
    assert wait_until(lambda: len(studio.find(job_id, token).blocks) == 2, 120)
    return job_id


def goes_on_once_asked(group_log: GroupLog) -> None:
    """The film waits for the wish, however slow the machine is."""

    def watch() -> None:
        wait_until(lambda: any(group.wishes for group in group_log.groups), 120)
        group_log.let_go.set()

    threading.Thread(target=watch).start()


def test_over_the_api(studio: Studio, group_log: GroupLog) -> None:
    calls, job_id = Calls(studio), running(studio)
    goes_on_once_asked(group_log)
    told = calls.steer(HTTP, job_id, "a red kite", "blend", OWNER)
    job = studio.engine.job(job_id)
    assert job is not None and told["block"] >= 2 and told["from_s"] > 0
    shots = told["settings"]["shots"]
    assert [shot["prompt"] for shot in shots] == ["a slow kite", "a red kite"] and shots[1]["transition"] == "blend"
    result = job.result(120)
    assert result.num_frames == job.request.num_frames == 129
    again = JobFolder(job.folder.path)
    assert again.request() == job.request and written(job.request).endswith("s blend] a red kite")
    assert [event.block for event in again.events() if isinstance(event, Steered)] == [told["block"]]
    assert 'title="shot 2' in timeline.shots_row(studio.find(job_id, studio.owner_of(OWNER)).request)


def test_whose_and_what_is_refused(studio: Studio, group_log: GroupLog) -> None:
    calls, job_id = Calls(studio), running(studio)
    with pytest.raises(RequestError, match=f"there is no job {job_id} here"):
        calls.steer(HTTP, job_id, "a red kite", None, "somebody else's secret")
    with pytest.raises(RequestError, match="the prompt is empty"):
        calls.steer(HTTP, job_id, " ", None, OWNER)
    with pytest.raises(RequestError, match="should be 'switch', 'blend' or 'cut'"):
        calls.steer(HTTP, job_id, "a red kite", "fade", OWNER)
    group_log.let_go.set()
    job = studio.engine.job(job_id)
    assert job is not None
    job.result(120)
    with pytest.raises(RequestError, match="is finished; only a running job can be steered"):
        calls.steer(HTTP, job_id, "a red kite", None, OWNER)
    plain = studio.compare(job_id, studio.owner_of(OWNER))
    with pytest.raises(RequestError, match="plain Wan takes one prompt"):
        calls.steer(HTTP, plain.job_id, "a red kite", None, OWNER)


def test_on_the_page(studio: Studio, group_log: GroupLog) -> None:
    page, job_id = Page(studio), running(studio)
    goes_on_once_asked(group_log)
    text, told = page.steering.from_here_on(OWNER, job_id, "a <red> kite", "switch", HTTP)
    assert text == "" and "“a &lt;red&gt; kite”" in told and told.startswith('<p role="status">From ')
    event = Steered(
        job_id=job_id,
        block=3,
        prompt="b",
        transition="cut",
        from_s=2.0625,
        num_blocks=9,
        num_items=90,
        num_frames=9,
        notice="n",
    )
    assert panels.steered(event) == '<p role="status">From 2.1 s on: “b” (n)</p>'


def test_cut_off_before_it_was_taken(studio: Studio, group_log: GroupLog) -> None:
    job_id = running(studio)
    job = studio.engine.job(job_id)
    assert job is not None
    with pytest.raises(TimeoutError):  # nobody takes anything while the job is held
        job.steer("a red kite", timeout=0.1)
    group_log.groups[-1].kill()
    assert wait_until(lambda: job.has_ended, 30)


def endless(studio: Studio) -> str:
    token = studio.owner_of(OWNER)
    wanted = {name: value for name, value in FILM.items() if name != "seconds"} | {"is_endless": True}
    job_id = studio.submit(GenerationRequest(**wanted), owner=token).job_id
    assert wait_until(lambda: len(studio.find(job_id, token).blocks) == 2, 120)
    return job_id


def test_an_endless_film_is_finished_over_the_api(studio: Studio, group_log: GroupLog) -> None:
    calls, job_id = Calls(studio), endless(studio)
    assert calls.status(HTTP, job_id, OWNER)["message"].endswith("ready, without an end")
    with pytest.raises(RequestError, match=f"there is no job {job_id} here"):
        calls.finish(HTTP, job_id, "somebody else's secret")
    group_log.let_go.set()
    assert wait_until(lambda: len(studio.find(job_id, studio.owner_of(OWNER)).blocks) > 40, 60)
    told = calls.finish(HTTP, job_id, OWNER)
    job = studio.engine.job(job_id)
    assert job is not None and job.result(120).num_frames == told["num_frames"] == job.request.num_frames
    with pytest.raises(RequestError, match="is finished; only a running film is wrapped up"):
        calls.finish(HTTP, job_id, OWNER)


def test_the_board_of_an_endless_film_promises_no_end(studio: Studio, group_log: GroupLog) -> None:
    job_id = endless(studio)
    found = studio.find(job_id, studio.owner_of(OWNER))
    shown, entered = panels.board(found, studio), charts.num_entered(found)
    assert 2 <= entered < len(plan_of(found.request).lengths), "more is planned than has begun"
    assert shown.count('class="block ') == entered and "2 blocks ready" in shown and "<span>…</span>" in shown
    assert (
        "aria-valuenow" not in shown.split('class="progress')[1].split(">")[0] and "%" not in shown.split('data-told="')[1][:12]
    )
    studio.cancel(job_id, studio.owner_of(OWNER))
    assert wait_until(lambda: studio.find(job_id, studio.owner_of(OWNER)).is_ended, 30)
    found = studio.find(job_id, studio.owner_of(OWNER))
    stopped = panels.board(found, studio)
    assert stopped.count('class="block ') == charts.num_entered(found) < 8 and "<span>…</span>" not in stopped


def test_the_shots_of_an_endless_film_end_with_its_blocks() -> None:
    film = GenerationRequest(prompt="[2s] a kite\n[3s] a boat", is_endless=True, num_per_block=4, num_cat=2)
    settings = complete(film, PAGE_PRESET)
    assert timeline.shots_row(settings, 1).count('class="shot') == 1
    assert timeline.shots_row(settings, 6).count('class="shot') == timeline.shots_row(settings).count('class="shot') == 2
    widths = [int(part.split('"')[0]) for part in timeline.shots_row(settings, 6).split("flex-grow:")[1:]]
    row = timeline.shots_row(settings, 6)
    assert "<em>…</em>" in row and row.count(" s</em>") == 1, "the last one has no length"
    shown = timeline.preview(settings)
    assert "the last goes on without an end" in shown and shown.count("<i ") < 10 < len(plan_of(settings).lengths)
    plan = plan_of(settings)
    assert sum(widths) == sum(plan.num_frames_of(block) for block in range(6))


def test_an_endless_film_is_finished_on_the_page(studio: Studio, group_log: GroupLog) -> None:
    page, job_id = Page(studio), endless(studio)
    group_log.let_go.set()
    told = page.steering.wrap_up(OWNER, job_id, HTTP)
    assert told.startswith('<p role="status">The film will have ')
    job = studio.engine.job(job_id)
    assert job is not None
    job.result(120)


def test_the_form_asks_for_an_endless_film(studio: Studio) -> None:
    wanted = studio.resolve(GenerationRequest(prompt="a kite", is_endless=True, seed=3))
    shown = dict(zip(form.NAMES, form.fill(studio, wanted.as_request()), strict=True))
    values = {name: update["value"] for name, update in shown.items()}
    assert values["is_endless"] and form.read(studio, list(values.values())) == wanted
    ended = form.read(studio, list((values | {"is_endless": False, "seconds": 2}).values()))
    assert not ended.is_endless and ended.num_frames == 33
    assert "endless" in panels.estimate_line(studio.estimate(wanted))


def test_a_page_says_what_is_played_and_that_the_film_waits(
    studio: Studio, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {name: value for name, value in FILM.items() if name != "seconds"} | {"is_endless": True}
    job_id = studio.submit(GenerationRequest(**wanted), owner=studio.owner_of(OWNER)).job_id
    job, page = studio.engine.job(job_id), Page(studio)
    assert job is not None and wait_until(lambda: job.state == "running", 30)
    told: list[float] = []
    monkeypatch.setattr(job, "tell_played", told.append)
    for token, shown, played_s in (
        (OWNER, job_id, 2.5),
        (OWNER, job_id, -1.0),
        ("a stranger's", job_id, 9.0),
        (OWNER, "", 9.0),
    ):
        page._tick_all(token, shown, played_s, 0, 0, "", "all", HTTP)
    page._tick_all(OWNER, job_id, None, 0, 0, "", "all", HTTP)  # type: ignore[arg-type]
    assert told == [2.5]
    monkeypatch.undo()
    job.tell_played(1.0)
    found = studio.find(job_id, studio.owner_of(OWNER))
    assert found.progress is not None
    held = replace(found, progress=replace(found.progress, is_held=True))
    assert panels.headline(held, studio)[0] == "Waiting for you"
    job.cancel()
    group_log.let_go.set()
