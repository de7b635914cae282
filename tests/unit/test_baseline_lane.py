"""Comparisons with plain Wan that the page asks for: one after another, only when the engine is idle, stoppable."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest, RequestError
from dualparal.errors import EngineError, JobCancelled, QueueFull, WorkerDied, WorkerFailed
from dualparal.events import Finished, Started
from dualparal.runtime import baseline_lane, dispatcher
from dualparal.runtime.baseline_lane import BaselineLane, make_baseline_folder
from dualparal.runtime.claim import claim, is_claimed
from dualparal.runtime.journal import JobFolder, new_job_id
from dualparal.runtime.recovery import cut_off
from dualparal.ui import panels, snapshot
from dualparal.ui.studio import Studio
from tests.conftest import wait_until
from tests.fake_group import fake_groups

SECONDS = 240.0
# A process that starts, waits for a file beside its folder, and finishes.
SCRIPT = """
import sys, time, json, pathlib
from dualparal.events import Started, Progress, Finished
from dualparal.runtime.journal import JobFolder
class Telling(JobFolder):
    def append(self, event):
        super().append(event)
        print(json.dumps(event.to_json()), flush=True)
folder = Telling(pathlib.Path(sys.argv[1]))
folder.append(Started(job_id=folder.job_id, num_blocks=1, num_items=2, num_frames=5))
folder.append(Progress(job_id=folder.job_id, items_done=1, num_items=2, num_steps=2, block_steps=(1,)))
go = folder.path.parent / "go"
while not go.exists():
    time.sleep(0.05)
if go.read_text() == "die":
    sys.exit(3)
if go.read_text() == "babble":
    print('{"event": "Unheard of"}\\n{ torn\\n[]\\n{"event": "Progress", "nonsense": 1}', flush=True)
if go.read_text() == "hang":
    time.sleep(600)
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
    assert lane.jobs() == [job, stopped]
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


def test_one_that_cannot_be_started_or_read_does_not_stop_the_others(
    lane: BaselineLane, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "idle").touch()
    command = baseline_lane.baseline_command
    monkeypatch.setattr(baseline_lane, "baseline_command", lambda folder, *_: ["/no/such/program"])
    with pytest.raises(WorkerFailed, match="No such file"):
        lane.submit(make_folder(tiny, tmp_path), "me").result(SECONDS)
    monkeypatch.setattr(baseline_lane, "baseline_command", command)
    (tmp_path / "go").write_text("babble")
    assert lane.submit(make_folder(tiny, tmp_path), "me").result(SECONDS).num_frames == 5
    (tmp_path / "go").write_text("hang")
    stuck = lane.submit(make_folder(tiny, tmp_path), "me")
    assert wait_until(lambda: stuck.view().progress is not None, SECONDS)
    monkeypatch.setattr(baseline_lane, "SILENCE_S", 0.2)
    hung = lane.submit(make_folder(tiny, tmp_path), "me")
    stuck.cancel()
    with pytest.raises(JobCancelled):
        stuck.result(SECONDS)
    with pytest.raises(WorkerDied, match="has told nothing"):
        hung.result(SECONDS)
    monkeypatch.setattr(baseline_lane, "SILENCE_S", SECONDS)
    (tmp_path / "go").write_text("well")
    assert lane.submit(make_folder(tiny, tmp_path), "me").result(SECONDS).num_frames == 5


def test_closed_while_it_runs(lane: BaselineLane, tiny: Path, tmp_path: Path) -> None:
    """It does not go on by itself after a restart, and cannot be resumed."""
    (tmp_path / "idle").touch()
    job = lane.submit(make_folder(tiny, tmp_path), "me")
    assert wait_until(lambda: job.state == "running", SECONDS)
    waiting = lane.submit(make_folder(tiny, tmp_path), "me")
    lane.close()
    for one in (job, waiting):
        with pytest.raises(EngineError, match="closed before the comparison"):
            one.result(0)
        assert one.folder.final_event() is None and not is_claimed(one.folder)
    with pytest.raises(RequestError, match="start it again"):
        make_engine(tiny, tmp_path)._go_on(job.folder)


def test_what_was_cut_off_is_given_up(tiny: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny, tmp_path)
    claim(folder).release()  # the program that made it has ended
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
    with pytest.raises(RequestError, match="cannot be compared"):
        studio.compare(found.job_id, "me")


def test_not_with_other_layers(tiny: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny, tmp_path, quantization="fp8")
    assert not engine.can_compare and make_engine(tiny, tmp_path).can_compare
    request = engine.resolve(GenerationRequest(prompt="x", latents_num=1, height=32, width=32))
    with pytest.raises(RequestError, match="diffusers as it is"):
        make_baseline_folder(engine, request, new_job_id())


def test_comparisons_share_the_limits_and_are_counted_and_forgotten(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_lane, "baseline_command", lambda folder, *_: [sys.executable, "-c", SCRIPT, str(folder)])
    monkeypatch.setattr(dispatcher, "KEEP_ENDED", 0)
    asked = GenerationRequest(prompt="x", latents_num=2, height=32, width=32)
    with fake_groups(monkeypatch) as notes:
        engine = make_engine(
            tiny, tmp_path, max_queue=2, max_per_owner=2, admit=lambda r: "no foxes" if "fox" in r.prompt else None
        ).start()
        try:
            busy = engine.submit(asked.model_copy(update={"prompt": "slow"}), owner="anna")
            assert wait_until(lambda: busy.state == "running", SECONDS)
            first = engine.compare(asked, owner="anna")
            with pytest.raises(QueueFull, match="you have 2 jobs"):
                engine.compare(asked, owner="anna")
            with pytest.raises(QueueFull, match="you have 2 jobs"):
                engine.submit(asked, owner="anna")
            second = engine.compare(asked, owner="bert")
            for attempt in (engine.compare, engine.submit):
                with pytest.raises(QueueFull, match="2 jobs are waiting"):
                    attempt(asked, owner="carl")
            second.cancel()
            with pytest.raises(RequestError, match="no foxes"):
                engine.compare(GenerationRequest(prompt="a fox", latents_num=2, height=32, width=32), owner="carl")
            assert engine.job(first.id) is first and engine.jobs() == [busy, first]
            (tmp_path / "go").touch()
            notes.let_go.set()
            first.result(SECONDS)
            assert wait_until(lambda: engine.job(first.id) is None and engine.jobs() == [], SECONDS)
            assert engine.desk.tally.num_submitted == 3
            assert engine.desk.tally.ends == {"finished": 2, "cancelled": 1}
        finally:
            engine.close()


def test_a_comparison_has_to_fit_beside_the_engine(tiny: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny, tmp_path)
    plan = engine.plan(GenerationRequest(prompt="x", latents_num=100, height=64, width=64), is_short=True)
    baseline_lane.check_fits(plan, engine._gear.sizes)
    held = plan.bytes_in_all
    for have, fits in ((2 * held, False), (1000 * held, True), (None, True)):
        small = replace(plan, placement=replace(plan.placement, bytes_per_device=have))
        if fits:
            baseline_lane.check_fits(small, engine._gear.sizes)
        else:
            with pytest.raises(RequestError, match="the whole video at once and needs"):
                baseline_lane.check_fits(small, engine._gear.sizes)
    few = replace(plan, placement=replace(plan.placement, bytes_per_device=50 * held))
    baseline_lane.check_fits(few, engine._gear.sizes)
    with pytest.raises(RequestError):
        baseline_lane.check_fits(few, engine._gear.sizes, num_replicas=50)


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
