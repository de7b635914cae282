"""Comparisons with plain Wan that the page asks for: one after another, only when the engine is idle, stoppable."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest, RequestError
from dualparal.engine import comparer, dispatcher
from dualparal.errors import EngineError, JobCancelled, QueueFull, WorkerDied
from dualparal.events import Finished, Started
from dualparal.jobs.claim import claim, create_job, is_claimed
from dualparal.jobs.folder import JobFolder, new_job_id
from dualparal.jobs.recovery import cut_off
from dualparal.ui import panels, snapshot
from dualparal.ui.studio import Studio
from tests.conftest import wait_until
from tests.engine.test_serving import kinds, one_end, until, wants
from tests.fake_group import NUM_FRAMES, GroupLog, Make

SECONDS = 240.0


def make_engine(tiny: Path, tmp_path: Path, **options: object) -> Engine:
    return Engine(tiny, device="cpu", threads=1, outputs=tmp_path, **options)  # type: ignore[arg-type]


def make_folder(tiny: Path, tmp_path: Path) -> JobFolder:
    """Of a comparison, as a program that was killed leaves it."""
    engine = make_engine(tiny, tmp_path)
    request = engine.resolve(wants("x"))
    return create_job(tmp_path, new_job_id(), request, owner="me", baseline="wan", **engine._setup.made_with())


def test_waits_runs_and_tells(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        busy = engine.submit(wants("slow"))
        until(lambda: busy.state == "running")
        job, stopped = engine.compare(wants("x")), engine.compare(wants("y"))
        assert engine.jobs() == [busy, job, stopped]
        stopped.cancel()
        with pytest.raises(JobCancelled):
            stopped.result(SECONDS)
        assert job.state == "queued" and group_log.names() == ["slow"], "the engine is busy"
        group_log.let_go.set()
        assert job.result(SECONDS).num_frames == NUM_FRAMES
        assert group_log.names() == ["slow", "x"]
        until(lambda: engine.jobs() == [])
    assert [kind for kind in kinds(job) if kind != "BlockReady"] == ["Queued", "Started", "Finished"], (
        "each event is stored once"
    )
    assert [group.processes for group in group_log.groups] == [{"rank 0": None, "codec": None}, {"baseline": None}]


def test_later_jobs_do_not_wait_for_it(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        comparison = engine.compare(wants("slow comparison"), owner="anna")
        until(lambda: comparison.state == "running")
        assert engine.submit(wants("later"), owner="anna").result(SECONDS).num_frames == NUM_FRAMES
        assert comparison.state == "running"


def test_stopped_while_it_runs_and_killed(make: Make, group_log: GroupLog) -> None:
    with make(auto_resume=True) as engine:
        job = engine.compare(wants("slow"))
        until(lambda: job.state == "running")
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result(SECONDS)
        assert all(group.is_closed for group in group_log.groups if "baseline" in group.processes)
        for prompt in ("die", "die once"):  # it cannot go on by itself
            with pytest.raises(WorkerDied, match="baseline was killed by SIGKILL"):
                engine.compare(wants(prompt)).result(SECONDS)
        assert engine.state == "ready" and engine.error is None
        assert engine.compare(wants("after")).result(SECONDS).num_frames == NUM_FRAMES


def test_one_that_cannot_be_started_or_hangs_does_not_stop_the_others(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = comparer.BaselineGroup
    with make() as engine:
        monkeypatch.setattr(comparer, "BaselineGroup", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        with pytest.raises(EngineError, match="Too many open files"):
            engine.compare(wants("x")).result(SECONDS)
        monkeypatch.setattr(comparer, "BaselineGroup", really)
        with pytest.raises(WorkerDied, match="has been at one step for 3600 s"):
            engine.compare(wants("stuck")).result(SECONDS)
        assert engine.compare(wants("after")).result(SECONDS).num_frames == NUM_FRAMES


def test_closed_while_it_runs(make: Make, group_log: GroupLog) -> None:
    """It does not go on by itself after a restart, and cannot be resumed."""
    engine = make().start()
    job = engine.compare(wants("slow"))
    until(lambda: job.state == "running")
    waiting = engine.compare(wants("x"))
    engine.close()
    for one in (job, waiting):
        with pytest.raises(EngineError, match="closed before the job was done"):
            one.result(0)
        assert one.folder.final_event() is None and not is_claimed(one.folder)
    with pytest.raises(EngineError):
        engine.compare(wants("x"))
    with pytest.raises(RequestError, match="start it again"):
        make().resume(job.id)


def test_what_was_cut_off_is_given_up(tiny: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny, tmp_path)
    claim(folder).release()  # the program that made it has ended
    assert list(cut_off(tmp_path)) == []
    final = folder.final_event()
    assert final is not None and "comparison" in getattr(final, "message", "")


def test_the_page_offers_it_and_names_it(tiny: Path, tmp_path: Path) -> None:
    folder = make_folder(tiny, tmp_path)
    claim(folder).release()  # as if its program had ended
    found = snapshot.of_folder(folder)
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
    with pytest.raises(RequestError, match="diffusers as it is"):
        engine.compare(GenerationRequest(prompt="x", latents_num=1, height=32, width=32))


def test_comparisons_share_the_limits_and_are_counted_and_forgotten(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "KEEP_ENDED", 0)
    with make(max_queue=2, max_per_owner=2, admit=lambda r: "no foxes" if "fox" in r.prompt else None) as engine:
        busy = engine.submit(wants("slow"), owner="anna")
        until(lambda: busy.state == "running")
        first = engine.compare(wants("x"), owner="anna")
        with pytest.raises(QueueFull, match="you have 2 jobs"):
            engine.compare(wants("x"), owner="anna")
        with pytest.raises(QueueFull, match="you have 2 jobs"):
            engine.submit(wants("x"), owner="anna")
        second = engine.compare(wants("x"), owner="bert")
        for attempt in (engine.compare, engine.submit):
            with pytest.raises(QueueFull, match="2 jobs are waiting"):
                attempt(wants("x"), owner="carl")
        second.cancel()
        with pytest.raises(RequestError, match="no foxes"):
            engine.compare(wants("a fox"), owner="carl")
        assert engine.job(first.id) is first and engine.jobs() == [busy, first]
        group_log.let_go.set()
        first.result(SECONDS)
        until(lambda: engine.job(first.id) is None and engine.jobs() == [])
        assert engine.dispatcher.tally.num_submitted == 3
        assert engine.dispatcher.tally.ends == {"finished": 2, "cancelled": 1}


def test_a_comparison_has_to_fit_beside_the_engine(tiny: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny, tmp_path)
    plan = engine.plan(GenerationRequest(prompt="x", latents_num=100, height=64, width=64), is_short=True)
    comparer.check_fits(plan, engine._setup.sizes)
    held = plan.bytes_in_all
    for have, fits in ((2 * held, False), (1000 * held, True), (None, True)):
        small = replace(plan, placement=replace(plan.placement, bytes_per_device=have))
        if fits:
            comparer.check_fits(small, engine._setup.sizes)
        else:
            with pytest.raises(RequestError, match="the whole video at once and needs"):
                comparer.check_fits(small, engine._setup.sizes)
    few = replace(plan, placement=replace(plan.placement, bytes_per_device=50 * held))
    comparer.check_fits(few, engine._setup.sizes)
    with pytest.raises(RequestError):
        comparer.check_fits(few, engine._setup.sizes, num_replicas=50)


def test_the_real_pipeline(tiny: Path, tmp_path: Path) -> None:
    """Without the engine's own workers, as the command line has it; its death is named."""
    engine = make_engine(tiny, tmp_path)
    try:
        job = engine.compare(GenerationRequest(prompt="x", latents_num=2, height=32, width=32, num_inference_steps=2))
        result = job.result(SECONDS)
        assert Path(result.path).is_file() and result.num_frames == 5 and result.timings["load_s"] > 0
        progress = job.view().progress
        assert progress is not None and progress.items_done == 2
        assert [type(event) for event in job.folder.events()[1:]][::2] == [Started, Finished] and one_end(job) is Finished
        long = engine.compare(GenerationRequest(prompt="x", latents_num=40, height=64, width=64, num_inference_steps=200))
        assert wait_until(lambda: long.view().progress is not None, SECONDS)
        os.kill(engine._comparer.workers["baseline"]["pid"], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="baseline was killed by SIGKILL"):
            long.result(SECONDS)
    finally:
        engine.close()
