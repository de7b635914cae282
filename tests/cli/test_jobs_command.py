"""`jobs --cancel` and `--delete`: jobs of this and of other programs, those that nobody runs, and what cannot be done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dualparal.cli.main import main
from dualparal.engine import replica
from dualparal.events import Cancelled, Started
from dualparal.jobs.claim import claim
from dualparal.jobs.folder import JobFolder
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest
from tests.engine.test_serving import until, wants
from tests.fake_group import GroupLog, Make


def new_job(outputs: Path, job_id: str, **about: str) -> JobFolder:
    settings = complete(GenerationRequest(prompt="x", latents_num=4), Preset())
    return JobFolder.create(outputs, job_id, settings, **about)


def jobs(outputs: Path, *arguments: str) -> int:
    return main(["jobs", "--outputs", str(outputs), *arguments])


def test_running_and_waiting_jobs_are_stopped(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make() as engine:
        running, waiting, other = (engine.submit(wants(name)) for name in ("slow", "waiting", "other"))
        until(lambda: len(running.view().blocks) == 2)
        assert jobs(engine.outputs, "--cancel", waiting.id, running.id) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"job {waiting.id} was stopped after 0 frames",
            f"job {running.id} was stopped after 5 frames; finished part: {running.folder.video}",
        ]
        until(lambda: (running.state, waiting.state) == ("cancelled", "cancelled"))  # the journal is told before the job is
        assert other.result(10).num_frames == 13 and not running.folder.stop_wish.exists()
        assert jobs(engine.outputs, "--cancel", other.id) == 0
        assert capsys.readouterr().out == f"job {other.id} has finished already; there is nothing to stop\n"
        again = engine.resume(running.id)
        until(lambda: again.state == "running")
        assert jobs(engine.outputs, "--cancel", "last") == 0
        until(lambda: again.state == "cancelled")


def test_a_job_is_stopped_while_the_workers_cannot_start(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group_log.refuses_to_start = 1
    monkeypatch.setattr(replica, "PAUSE_AFTER_FAILED_START_S", 60.0)
    monkeypatch.setattr(replica, "MAX_PAUSE_S", 60.0)
    engine = make().start(wait=False)
    until(lambda: engine.state == "restarting")
    job = engine.submit(wants("waiting"))
    assert jobs(engine.outputs, "--cancel", job.id) == 0
    assert capsys.readouterr().out == f"job {job.id} was stopped after 0 frames\n"


def test_what_nobody_runs_any_more_is_ended_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = new_job(tmp_path, "aaaaaa")
    folder.append(Started(job_id="aaaaaa", num_blocks=1, num_items=1, num_frames=13))
    assert jobs(tmp_path, "--cancel", "last") == 0
    assert capsys.readouterr().out == "job aaaaaa was stopped after 0 frames\n"
    assert isinstance(folder.final_event(), Cancelled) and not folder.stop_wish.exists()
    assert jobs(tmp_path, "--cancel", "aaaaaa") == 0
    assert capsys.readouterr().out == "job aaaaaa was stopped already; there is nothing to stop\n"


def test_a_program_that_takes_its_time_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dualparal.cli.jobs.STOP_WAIT_S", 0.3)
    held = claim(folder := new_job(tmp_path, "aaaaaa"))
    assert jobs(tmp_path, "--cancel", "aaaaaa") == 0
    assert capsys.readouterr().out == "job aaaaaa has been asked to stop; it does so at its next block step\n"
    assert folder.stop_wish.exists() and folder.final_event() is None
    assert jobs(tmp_path, "--delete", "aaaaaa") == 2
    assert "stop it first with --cancel aaaaaa" in capsys.readouterr().err and folder.path.is_dir()
    held.release()


def test_delete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job_id, owner in (("aaaaaa", "anna"), ("bbbbbb", "anna"), ("cccccc", "bert"), ("dddddd", "bert")):
        new_job(tmp_path, job_id, owner=owner)
    assert jobs(tmp_path, "--delete", "cccccc", "eeeeee", "../aaaaaa", "--delete", "dddddd") == 2
    printed = capsys.readouterr()
    assert printed.out == "job cccccc was deleted\njob dddddd was deleted\n"
    assert printed.err.splitlines() == [
        "error: there is no job eeeeee here", "error: a job id is 6 to 36 lower-case hexadecimal digits and dashes",
    ]  # fmt: skip
    assert jobs(tmp_path, "--owner", "anna", "--delete", "last", "--cancel", "aaaaaa") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["aaaaaa"]
    assert jobs(tmp_path, "--owner", "bert", "--cancel", "last") == 2
    assert "there is no such job" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "aaaaaa")
    assert jobs(tmp_path, "--delete", "last") == 2
