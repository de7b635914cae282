"""A job's looks in the front end: for those who ask, in no journal, the newest on disk for its user alone."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualparal.events import Cancelled, Look, Queued
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.job import Job
from dualparal.jobs.looks import read_looks, rough_film
from dualparal.media.rough import pack
from dualparal.media.writer import remove_partials
from dualparal.messages import RunJob
from tests.settings import settings


def look(block: int, step: int = 1, shade: int = 100, num: int = 2, job_id: str = "abcdef") -> Look:
    shades = shade + np.linspace(-20, 20, num, dtype=int)
    picture = pack(np.broadcast_to(shades[:, None, None, None], (num, 8, 8, 3)).astype(np.uint8))
    return Look(job_id=job_id, block=block, step=step, num_steps=9, num_pictures=num, picture=picture)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = JobFolder.create(tmp_path, "abcdef", settings())
    made = Job(RunJob("abcdef", settings(), str(folder.path)), folder, "", lambda _: None)
    made.emit(Queued(job_id="abcdef", position=0))
    return made


def steps_of(events: list[Any]) -> list[tuple[int, int]]:
    return [(event.block, event.step) for event in events if isinstance(event, Look)]


def test_looks_come_to_those_who_ask(job: Job) -> None:
    for block, step in ((0, 1), (1, 1), (0, 2)):
        job.show(look(block, step))
    asked = job.events(timeout=60, looks=True)
    first = list(itertools.islice(asked, 3))
    assert isinstance(first[0], Queued) and steps_of(first) == [(1, 1), (0, 2)], "each block's newest only"
    job.show(look(1, 3))
    job.emit(Cancelled(job_id="abcdef"))
    rest = list(asked)
    assert steps_of(rest) == [(1, 3)] and isinstance(rest[-1], Cancelled)
    job.show(look(1, 4))
    assert steps_of(list(job.events(looks=True))) == [(0, 2), (1, 3)], "a job that has ended takes no more"
    assert [type(event) for event in job.events()] == [Queued, Cancelled], "nobody else is told"


def test_the_journal_has_none(job: Job) -> None:
    job.show(look(0))
    assert "Look" not in (job.folder.path / "events.jsonl").read_text()
    assert job.view().looks[0].step == 1 and 'picture"' not in json.dumps(look(0).to_json())


def test_the_newest_are_on_disk_for_this_user(job: Job) -> None:
    for block, shade in ((0, 20), (1, 200), (0, 90)):
        job.show(look(block, shade=shade))
    files = sorted(job.folder.look.iterdir())
    assert [file.name for file in files] == ["0000.jpg", "0001.jpg"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600} and job.folder.look.stat().st_mode & 0o777 == 0o700
    assert [round(float(pictures.mean())) for pictures in read_looks(job.folder)] == [90, 200]


def test_no_look_is_written_durably(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(*_: object) -> None:
        raise AssertionError("looks come several times a second")

    monkeypatch.setattr("os.fsync", sync)
    job.show(look(0))


def test_a_full_disk_costs_the_file_only(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dualparal.jobs.looks._write", full)
    job.show(look(0))
    assert job.view().looks[0].block == 0


def test_the_rough_film(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first block to the last before one that has none; made anew when there is something new."""
    assert rough_film(job.folder, 16) is None
    for block in (0, 1, 3):
        job.show(look(block))
    path = rough_film(job.folder, 16)
    assert path is not None and path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert Image.open(io.BytesIO(before)).n_frames == 4
    with monkeypatch.context() as patched:
        patched.setattr("dualparal.jobs.looks.film", lambda *_: pytest.fail("nothing is new"))
        assert rough_film(job.folder, 16) == path
    job.show(look(2, shade=220))
    assert rough_film(job.folder, 16) == path and path.read_bytes() != before
    assert Image.open(io.BytesIO(path.read_bytes())).n_frames == 8


def test_a_damaged_look_ends_the_film(job: Job) -> None:
    for block in (0, 1):
        job.show(look(block))
    (job.folder.look / "0001.jpg").write_bytes(b"\xff\xd8 torn")
    assert len(list(read_looks(job.folder))) == 1


def test_what_a_kill_leaves_half_written_goes_with_the_next_run(job: Job) -> None:
    job.show(look(0))
    torn = [job.folder.look / ".0000.jpg.0a1b2c3d.part", job.folder.path / ".look.webp.0a1b2c3d.part"]
    for path in torn:
        path.write_bytes(b"")
    remove_partials(job.folder.path)
    assert not any(path.exists() for path in torn) and (job.folder.look / "0000.jpg").is_file()


def test_looks_from_the_workers(make: Callable[..., Any], group_log: Any) -> None:
    """Through the engine: what rank 0 sends is the job's, what comes for a job of before is dropped; deleted with the job."""
    with make() as engine:
        job = engine.submit(settings(prompt="slow", height=32, width=32))
        replica = engine.replicas[0]
        assert next(event for event in job.events(timeout=60) if type(event).__name__ == "Started")
        replica.take(look(0, job_id=job.id))
        replica.take(look(0, job_id="fedcba"))
        assert job.view().looks[0].step == 1 and (job.folder.look / "0000.jpg").is_file()
        group_log.let_go.set()
        job.result(timeout=60)
        job.folder.delete()
        assert not job.folder.path.exists()
