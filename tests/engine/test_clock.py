"""A clock that jumps by a day, there and back, spoils no estimate: times are measured by one that nobody sets."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from dualparal.engine.engine import Engine
from dualparal.errors import WorkerDied
from dualparal.jobs.facts import all_facts, read_history
from dualparal.request import Settings
from dualparal.ui import panels, snapshot
from dualparal.ui.studio import Studio
from tests.engine.test_serving import SECONDS, wants
from tests.fake_group import Make

DAY_S = 86_400.0
LONG_S = 3600.0  # no job here takes so long, and no jump is shorter


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it set: a day ahead, two days back, right."""
    real, offsets = time.time, itertools.cycle((0.0, DAY_S, -2 * DAY_S, DAY_S / 2))
    monkeypatch.setattr(time, "time", lambda: real() + next(offsets))


def settings_of(engine: Engine) -> Settings:
    return engine.resolve(wants("next"))


def test_estimates_are_as_with_a_clock_that_goes_right(make: Make, jumping: None) -> None:
    with make(auto_resume=True) as engine:
        for number in range(6):
            job = engine.submit(wants(f"calm {number}"))
            assert job.result(SECONDS).num_frames == job.request.num_frames
            history, state = read_history(job.folder)
            times = {event.time_s for event in job.folder.events()}
            assert max(times) - min(times) > DAY_S / 4, "the clock went right"
            assert (state, history.is_timed) == ("finished", True)
            assert 0 <= history.worked_s < LONG_S and (history.first_frames_s or 0) <= history.worked_s
            found = snapshot.of_folder(job.folder)
            assert found.made_in_s is not None and found.made_in_s < LONG_S
            assert "day" not in panels.headline(found, Studio(engine))[1]
        once = engine.submit(wants("die once"))
        assert once.result(SECONDS).num_frames == once.request.num_frames
        assert 0 <= once.view().history.worked_s < LONG_S
        studio = Studio(engine)
        pace = studio.estimator.pace()
        assert pace is not None and 0 <= pace.time_s(studio.estimator._costs_of(settings_of(engine)).work) < LONG_S
        waiting_s = studio.starts_in_s()
        assert waiting_s is not None and 0 <= waiting_s < LONG_S
        estimate = studio.estimate(settings_of(engine))
        assert estimate.time_s is not None and 0 <= estimate.time_s < LONG_S
    assert all(0 <= facts.worked_s < LONG_S and facts.age_s >= 0 for facts in all_facts(engine.outputs))


def test_a_job_that_is_resumed_after_a_jump(make: Make, jumping: None, tmp_path: Path) -> None:
    with make() as engine:
        job = engine.submit(wants("die once"))
        with pytest.raises(WorkerDied):
            job.result(SECONDS)
        again = engine.resume(job.id)
        assert again.result(SECONDS).num_frames == again.request.num_frames
        history, _ = read_history(again.folder)
        assert history.num_runs == 2 and 0 <= history.worked_s < LONG_S


def test_old_videos_do_not_go_for_a_clock_that_is_a_day_ahead(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other people's go after a week."""
    with make() as engine:
        job = engine.submit(wants("kept"), owner="anna")
        job.result(SECONDS)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + DAY_S)
    from dualparal.jobs.storage import _is_old

    assert not _is_old(job.folder)
