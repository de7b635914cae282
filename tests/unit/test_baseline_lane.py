"""Comparisons with plain Wan that the page asks for: one after another, only when the engine is idle, stoppable."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest, RequestError
from dualparal.errors import JobCancelled, WorkerDied
from dualparal.events import Finished, Started
from dualparal.runtime import baseline_lane
from dualparal.runtime.baseline_lane import BaselineLane, make_baseline_folder
from dualparal.runtime.journal import JobFolder, new_job_id
from dualparal.runtime.recovery import cut_off
from dualparal.ui import panels, snapshot
from dualparal.ui.studio import Studio
from tests.conftest import wait_until

SECONDS = 240.0
# A process that starts, waits for a file beside its folder, and finishes.
SCRIPT = """
import sys, time, json, pathlib
from dualparal.baseline import _Telling
from dualparal.events import Started, Progress, Finished
folder = _Telling(pathlib.Path(sys.argv[1]))
folder.append(Started(job_id=folder.job_id, num_blocks=1, num_items=2, num_frames=5))
folder.append(Progress(job_id=folder.job_id, items_done=1, num_items=2, num_steps=2, block_steps=(1,)))
go = folder.path.parent / "go"
while not go.exists():
    time.sleep(0.05)
if go.read_text() == "die":
    sys.exit(3)
folder.append(Finished(job_id=folder.job_id, path="video.mp4", num_frames=5, timings={}))
"""


@pytest.fixture
def lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaselineLane]:
    monkeypatch.setattr(baseline_lane, "baseline_command", lambda folder, *_: [sys.executable, "-c", SCRIPT, str(folder)])
    found = BaselineLane("cpu", "keep", is_idle=(tmp_path / "idle").exists)
    yield found
    found.close()


def make_engine(tiny: Path, tmp_path: Path, **options: object) -> Engine:
    return Engine(tiny, device="cpu", threads=1, outputs=tmp_path, **options)  # type: ignore[arg-type]


def make_folder(tiny: Path, tmp_path: Path, **values: object) -> JobFolder:
    engine = make_engine(tiny, tmp_path)
    asked = {"prompt": "x", "latents_num": 2, "num_per_block": 2, "num_cat": 1, "height": 32, "width": 32, "seed": 0,
             "num_inference_steps": 2, **values}  # fmt: skip
    return make_baseline_folder(engine, engine.resolve(GenerationRequest(**asked)), new_job_id(), owner="me")  # type: ignore[arg-type]


def test_waits_runs_and_tells(lane: BaselineLane, tiny: Path, tmp_path: Path) -> None:
    job, stopped = (lane.submit(make_folder(tiny, tmp_path), "me") for _ in range(2))
    assert lane.get(job.id) is job and lane.jobs() == [job, stopped]
    time.sleep(2 * baseline_lane.LOOK_EVERY_S)
    assert job.state == "queued", "the engine is busy"
    stopped.cancel()
    with pytest.raises(JobCancelled):
        stopped.result(SECONDS)
    (tmp_path / "idle").touch()
    assert wait_until(lambda: job.view().progress is not None, SECONDS)
    assert job.state == "running" and lane.jobs() == [job]
    (tmp_path / "go").touch()
    assert job.result(SECONDS).num_frames == 5
    assert wait_until(lambda: lane.jobs() == [])
    assert [type(event) for event in job.folder.events()] == [Started, Finished], "each event is stored once"


def test_stopped_while_it_runs(lane: BaselineLane, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "idle").touch()
    job = lane.submit(make_folder(tiny, tmp_path), "me")
    assert wait_until(lambda: job.state == "running", SECONDS)
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(SECONDS)
    after = lane.submit(make_folder(tiny, tmp_path), "me")
    (tmp_path / "go").write_text("die")
    with pytest.raises(WorkerDied, match="exit code 3"):
        after.result(SECONDS)


def test_closed_while_it_runs(lane: BaselineLane, tiny: Path, tmp_path: Path) -> None:
    """It does not go on by itself after a restart, and cannot be resumed."""
    (tmp_path / "idle").touch()
    job = lane.submit(make_folder(tiny, tmp_path), "me")
    assert wait_until(lambda: job.state == "running", SECONDS)
    lane.close()
    assert not job.has_ended and job.folder.final_event() is None
    with pytest.raises(RequestError, match="start it again"):
        make_engine(tiny, tmp_path)._go_on(job.folder)


def test_what_was_cut_off_is_given_up(tiny: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny, tmp_path)
    assert list(cut_off(tmp_path)) == []
    final = folder.final_event()
    assert final is not None and "comparison" in getattr(final, "message", "")


def test_the_page_offers_it_and_names_it(tiny: Path, tmp_path: Path) -> None:
    found = snapshot.of_folder(make_folder(tiny, tmp_path))
    assert found.is_baseline and "plain Wan, one pass" in panels.result(found, "")
    assert 'data-do="compare"' in panels.result(found, "", can_compare=True)
    assert 'data-do="compare"' not in panels.result(found, "")
    studio = Studio(make_engine(tiny, tmp_path))
    assert not studio.can_compare(found) and not studio.can_resume(found)


def test_not_with_other_layers(tiny: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny, tmp_path, quantization="fp8")
    assert not engine.can_compare and make_engine(tiny, tmp_path).can_compare
    request = engine.resolve(GenerationRequest(prompt="x", latents_num=1, height=32, width=32))
    with pytest.raises(RequestError, match="diffusers as it is"):
        make_baseline_folder(engine, request, new_job_id())


def test_the_real_pipeline(tiny: Path, tmp_path: Path) -> None:
    lane = BaselineLane("cpu", "keep", is_idle=lambda: True)
    try:
        job = lane.submit(make_folder(tiny, tmp_path), "me")
        result = job.result(SECONDS)
        assert Path(result.path).is_file() and result.num_frames == 5
        progress = job.view().progress
        assert progress is not None and progress.items_done == 2
    finally:
        lane.close()
