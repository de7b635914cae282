"""The engine as a service, without processes: order, deaths, stops, restarts, several replicas, what is kept in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualparal.engine import dispatcher, replica
from dualparal.engine.engine import Engine
from dualparal.errors import (
    DualParalError,
    EngineError,
    JobCancelled,
    OutOfMemory,
    OutputError,
    QueueFull,
    RequestError,
    WorkerDied,
)
from dualparal.events import BlockReady, Cancelled, Failed, Finished, Interrupted, Queued, Started, event_from_json
from dualparal.files import STATE_FOLDER
from dualparal.jobs import recovery
from dualparal.jobs.claim import claim, is_claimed
from dualparal.jobs.facts import list_facts
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.job import Job
from dualparal.jobs.timeline import Timeline
from dualparal.messages import Span, WorkerError
from dualparal.request import GenerationRequest
from tests.fake_group import FOUR_BLOCKS, HALF_THE_FRAMES, NUM_BLOCKS, NUM_FRAMES, GroupLog, Make

SECONDS = 10.0


def wants(prompt: str) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, **FOUR_BLOCKS)


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def kinds(job: Job) -> list[str]:
    return [type(event).__name__ for event in job.folder.events()]


def one_end(job: Job) -> type:
    """The kind of the only final event in the journal."""
    finals = [event for event in job.folder.events() if isinstance(event, (Finished, Failed, Cancelled))]
    assert len(finals) == 1, finals
    return type(finals[0])


def test_owners_take_turns(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        first = engine.submit(wants("slow"), owner="anna")
        until(lambda: first.state == "running")
        jobs = [engine.submit(wants(name), owner=name[0]) for name in ("anna 1", "anna 2", "anna 3", "bert 1", "carl 1")]
        assert [job.view().position for job in jobs] == [1, 4, 5, 2, 3]
        assert engine.jobs()[0] is first
        group_log.let_go.set()
        for job in jobs:
            job.result(SECONDS)
    assert group_log.names() == ["slow", "anna 1", "bert 1", "carl 1", "anna 2", "anna 3"]


def test_limits(make: Make) -> None:
    with make(max_queue=3, max_per_owner=2, admit=lambda r: "too large" if "large" in r.prompt else None) as engine:
        running = engine.submit(wants("slow"), owner="anna")
        until(lambda: running.state == "running")
        engine.submit(wants("a"), owner="anna")
        with pytest.raises(QueueFull, match="you have 2 jobs"):
            engine.submit(wants("b"), owner="anna")
        engine.submit(wants("c"), owner="bert")
        engine.submit(wants("d"), owner="carl")
        with pytest.raises(QueueFull, match="3 jobs are waiting"):
            engine.submit(wants("e"), owner="dora")
        with pytest.raises(RequestError, match="too large"):
            engine.submit(wants("large"), owner="dora")
        assert len(list(engine.outputs.iterdir())) == 4, "what was refused left nothing"


def test_a_death_is_named_and_the_queue_goes_on(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        dying, after = engine.submit(wants("die")), engine.submit(wants("after"))
        with pytest.raises(WorkerDied, match="SIGKILL"):
            dying.result(SECONDS)
        assert after.result(SECONDS).num_frames == NUM_FRAMES
    assert one_end(dying) is Failed
    assert (dying.view().final.path, dying.view().final.num_frames) == (str(dying.folder.video), HALF_THE_FRAMES)  # type: ignore[union-attr]
    assert [group.is_closed for group in group_log.groups] == [True, True]


def test_auto_resume_once(make: Make, group_log: GroupLog) -> None:
    with make(auto_resume=True) as engine:
        once, after = engine.submit(wants("die once")), engine.submit(wants("after"))
        assert once.result(SECONDS).num_frames == NUM_FRAMES
        after.result(SECONDS)
        twice = engine.submit(wants("die always"))
        with pytest.raises(WorkerDied):
            twice.result(SECONDS)
        seen = [type(event).__name__ for event in twice.events()]
    assert group_log.names() == ["die once", "die once", "after", "die always", "die always"]
    assert [run.is_resumed for run in group_log.runs] == [False, True, False, False, True]
    assert [len(once.view().blocks), one_end(once), one_end(twice)] == [NUM_BLOCKS, Finished, Failed]
    expected = ["Queued", "Started", "BlockReady", "BlockReady", "Interrupted", "Queued", "Started"]
    assert kinds(once) == [*expected, "BlockReady", "BlockReady", "Finished"]
    assert [kind for kind in seen if kind != "Progress"] == [*expected, "Failed"]
    assert engine.dispatcher.tally.num_interrupted == 2


def test_a_job_being_stopped_is_stopped_even_by_a_death(make: Make, group_log: GroupLog) -> None:
    with make(auto_resume=True) as engine:
        job = engine.submit(wants("slow"))
        until(lambda: len(job.view().blocks) == 2)
        job.is_stopping = True  # the message was on its way
        group_log.groups[0].kill()
        with pytest.raises(JobCancelled):
            job.result(SECONDS)
    assert one_end(job) is Cancelled


def test_stop_while_running_and_while_waiting(make: Make) -> None:
    with make() as engine:
        running, waiting = engine.submit(wants("slow")), engine.submit(wants("waiting"))
        until(lambda: len(running.view().blocks) == 2)
        waiting.cancel()
        running.cancel()
        for job in (waiting, running):
            with pytest.raises(JobCancelled):
                job.result(SECONDS)
            assert one_end(job) is Cancelled
        again = engine.resume(running.id)
        assert len(again.view().blocks) == 2
        until(lambda: again.state == "running")
        again.cancel()
        again.cancel()


def test_a_restart_goes_on_with_everything(make: Make, group_log: GroupLog) -> None:
    engine = make().start()
    done = engine.submit(wants("done"))
    done.result(SECONDS)
    running = engine.submit(wants("slow"), owner="anna")
    waiting = [engine.submit(wants(f"waiting {n}"), owner="bert") for n in range(2)]
    until(lambda: len(running.view().blocks) == 2)
    assert [facts.state for facts in list_facts(engine.outputs)] == ["queued", "queued", "running", "finished"]
    assert make().recover() == [], "somebody works on them"
    engine.close()
    with pytest.raises(EngineError, match="closed before"):
        running.result(0)
    assert [facts.state for facts in list_facts(engine.outputs)] == ["interrupted"] * 3 + ["finished"]
    group_log.let_go.set()

    second = make()
    found = second.recover()
    assert [job.id for job in found] == [running.id, *(job.id for job in waiting)]
    assert second.recover() == []
    assert [job.owner for job in found] == ["anna", "bert", "bert"]
    with second:
        assert [job.result(SECONDS).num_frames for job in found] == [NUM_FRAMES] * 3
    for job in found:
        assert one_end(job) is Finished
    assert [kind for kind in kinds(found[0]) if kind in ("Interrupted", "Started")] == ["Started", "Interrupted", "Started"]
    assert "Interrupted" not in kinds(found[1]), "it had not begun"
    assert group_log.names().count("done") == 1


def test_saved_sweeps_go_after_the_end_is_written_down(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any moment leaves a job that goes on from what it saved, or one that has finished."""
    known: list[str] = []
    really = JobFolder.drop_state

    def drop_state(folder: JobFolder) -> None:
        known.append(type(folder.final_event()).__name__)
        really(folder)

    monkeypatch.setattr(JobFolder, "drop_state", drop_state)
    with make() as engine:
        slow = engine.submit(wants("slow"))
        until(lambda: len(slow.view().blocks) == 2)
        (slow.folder.path / STATE_FOLDER).mkdir()
        slow.cancel()
        with pytest.raises(JobCancelled):
            slow.result(SECONDS)
        assert (slow.folder.path / STATE_FOLDER).is_dir(), "it may be resumed"
        job = engine.submit(wants("quick"))
        (job.folder.path / STATE_FOLDER).mkdir(exist_ok=True)
        job.result(SECONDS)
        assert known == ["Finished"] and not (job.folder.path / STATE_FOLDER).exists()


def test_saved_sweeps_of_a_finished_job_are_cleared_away(make: Make) -> None:
    """The program was killed after the end had been written down."""
    engine = make()
    folder = _left_behind(engine, "abcdef")
    folder.append(Finished(job_id="abcdef", path=str(folder.video), num_frames=1, timings={}))
    for name in (STATE_FOLDER, f".{STATE_FOLDER}.going"):
        (folder.path / name).mkdir()
        (folder.path / name / "latents_0000.safetensors").touch()
    assert engine.recover() == []
    assert sorted(path.name for path in folder.path.iterdir()) == ["events.jsonl", "request.json"]


def test_a_job_that_takes_the_program_down_is_given_up(make: Make, tmp_path: Path) -> None:
    engine = make()
    folder = _left_behind(engine, "abcdef")
    for _ in range(recovery.MAX_INTERRUPTIONS):
        folder.append(Started(job_id="abcdef", num_blocks=1, num_items=1, num_frames=1))
        assert [found.job_id for found in recovery.cut_off(engine.outputs)] == ["abcdef"]
    folder.append(Started(job_id="abcdef", num_blocks=1, num_items=1, num_frames=1))
    assert engine.recover() == []
    final = folder.final_event()
    assert isinstance(final, Failed) and "cut off 6 times" in final.message


def test_what_cannot_go_on_is_ended_or_left_alone(make: Make) -> None:
    engine = make()
    tensors = _left_behind(engine, "aaaaaa", has_tensors=True)
    other = _left_behind(engine, "bbbbbb", model="/elsewhere")
    damaged = _left_behind(engine, "cccccc")
    (damaged.path / "request.json").write_text("{")
    bad = _left_behind(engine, "dddddd")
    (bad.path / "request.json").write_text((bad.path / "request.json").read_text().replace('"prompt"', '"nonsense"'))
    assert engine.recover() == []
    assert isinstance(tensors.final_event(), Failed)
    assert other.final_event() is None and damaged.final_event() is None


def test_blocks_of_a_folder_that_moved(make: Make) -> None:
    engine = make()
    folder = _left_behind(engine, "abcdef")
    for block in (0, 1, 1, 2, 4):
        (folder.path / f"block_{block:04d}.ts").write_bytes(b"G" * 188)
        folder.append(_ready(block))
    (folder.path / "block_0002.ts").unlink()
    job = engine.recover()[0]
    assert [(event.block, Path(event.path).parent) for event in job.view().blocks] == [(0, folder.path), (1, folder.path)]


def test_replicas_share_the_queue_and_one_may_fail(make: Make, group_log: GroupLog) -> None:
    with make(replicas=2, auto_resume=True) as engine:
        until(lambda: [one.state for one in engine.replicas] == ["ready", "ready"])
        slow = [engine.submit(wants("slow")), engine.submit(wants("slow die once"))]
        until(lambda: all(len(job.view().blocks) == 2 for job in slow))
        third = engine.submit(wants("third"))
        assert third.view().position == 1, "one of two has to end first"
        assert sorted(engine.workers)[0] == "replica 0 codec"
        group_log.groups[0].kill()
        group_log.let_go.set()
        for job in (*slow, third):
            assert job.result(SECONDS).num_frames == NUM_FRAMES
            assert one_end(job) is Finished
        until(lambda: [one.state for one in engine.replicas] == ["ready", "ready"])
        assert engine.replicas[0].num_restarts + engine.replicas[1].num_restarts >= 1


def test_one_replica_that_never_starts_leaves_the_other_serving(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualparal.engine.setup.place", lambda d, ranks, n=0, of=1: (("cpu",), f"cpu:{n}"))
    group_log.dead_replicas = {"cpu:1"}
    with make(replicas=2) as engine:
        until(lambda: engine.replicas[1].state == "failed")
        assert engine.state == "ready" and "rank 0 was killed" in str(engine.error)
        assert engine.submit(wants("alone")).result(SECONDS).num_frames == NUM_FRAMES


def test_when_all_have_failed_nothing_waits_for_ever(make: Make, group_log: GroupLog) -> None:
    group_log.refuses_to_start = 99
    engine = make(replicas=2)
    with engine.dispatcher.changed:  # the last replica fails after that
        job = engine.start(wait=False).submit(wants("never"))
    with pytest.raises(WorkerDied):
        job.result(SECONDS)
    with pytest.raises(WorkerDied):
        engine.submit(wants("no"))
    with pytest.raises(WorkerDied):
        engine.wait_ready(1)
    assert engine.state == "failed"


def test_a_codec_that_hangs_in_mid_block_is_named_and_replaced(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        stuck, after = engine.submit(wants("stuck")), engine.submit(wants("after"))
        with pytest.raises(WorkerDied, match=r"codec has been at one step for 600 s \(decoding block 1\)"):
            stuck.result(SECONDS)
        assert after.result(SECONDS).num_frames == NUM_FRAMES
    assert one_end(stuck) is Failed and len(group_log.groups) == 2


def no_memory(number: int = 1) -> list[WorkerError]:
    return [WorkerError("rank 0", "OutOfMemory", "rank 0 ran out of memory; use more ranks")] * number


def test_workers_that_served_once_are_given_time_to_come_back(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        engine.submit(wants("before")).result(SECONDS)
        group_log.start_errors = no_memory(replica.MAX_FAILED_RESTARTS - 1)
        group_log.groups[-1].kill()
        until(lambda: engine.replicas[0].num_restarts > 0)  # a job handed to the dead group would end with it
        assert engine.submit(wants("after")).result(SECONDS).num_frames == NUM_FRAMES
        assert engine.replicas[0].num_restarts == replica.MAX_FAILED_RESTARTS
        group_log.start_errors = no_memory(replica.MAX_FAILED_RESTARTS)
        group_log.groups[-1].kill()
        until(lambda: engine.replicas[0].num_restarts > replica.MAX_FAILED_RESTARTS)
        with pytest.raises(OutOfMemory):
            engine.submit(wants("never")).result(SECONDS)
        assert engine.state == "failed"


def test_what_cannot_work_is_given_up_at_once(make: Make, group_log: GroupLog) -> None:
    group_log.start_errors = no_memory()
    with pytest.raises(OutOfMemory):
        make().start()
    assert len(group_log.groups) == 1, "it has never served"
    with make() as engine:
        group_log.start_errors = [WorkerError("codec", "CheckpointError", "vae lacks a tensor; download it again")]
        group_log.groups[-1].kill()
        until(lambda: engine.state == "failed")
    assert len(group_log.groups) == 3


def test_an_engine_that_waits_to_start_again_can_be_closed(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as engine:
        monkeypatch.setattr(replica, "PAUSE_AFTER_FAILED_START_S", 600.0)
        monkeypatch.setattr(replica, "MAX_PAUSE_S", 600.0)
        group_log.start_errors = no_memory()
        group_log.groups[-1].kill()
        until(lambda: len(group_log.groups) == 2 and group_log.groups[1].is_closed and engine.state == "restarting")
    assert engine.state == "closed"


def test_a_fault_of_the_supervisor_is_a_death_like_any_other(
    make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as engine:
        monkeypatch.setattr(Timeline, "busy", lambda *_: 1 / 0)
        with pytest.raises(DualParalError, match="supervisor failed: ZeroDivisionError"):
            engine.submit(wants("x")).result(SECONDS)
        monkeypatch.undo()
    assert group_log.groups


def test_ended_jobs_are_forgotten(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "KEEP_ENDED", 5)
    num_open = len(os.listdir("/proc/self/fd"))
    with make() as engine:
        jobs = [engine.submit(wants(f"{n}")) for n in range(12)]
        for job in jobs:
            job.result(SECONDS)
        until(lambda: len(engine.dispatcher._jobs) == 5)
        assert engine.job(jobs[0].id) is None and engine.job(jobs[-1].id) is jobs[-1]
        assert len(os.listdir("/proc/self/fd")) <= num_open + 4, "claims are given back"
    assert len(os.listdir("/proc/self/fd")) <= num_open
    assert engine.dispatcher.tally.ends["finished"] == 12


def test_a_timeline_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.jobs.timeline.MAX_SPANS", 100)
    engine = make()
    job = engine.resume(_left_behind(engine, "abcdef").job_id)
    for number in range(500):
        job.timeline.add((Span("stage 0", number, number + 1, 0, number),))
    kept = job.view().timeline
    assert len(kept) <= 100 and kept[-1].step == 499


def test_a_claim_is_exclusive_and_short_looks_do_not_disturb(make: Make) -> None:
    engine = make()
    folder = _left_behind(engine, "abcdef")
    held = claim(folder)
    assert is_claimed(folder)
    with pytest.raises(RequestError, match="being worked on"):
        engine.resume("abcdef")
    held.release()
    held.release()
    assert not is_claimed(folder)
    engine.resume("abcdef")
    assert is_claimed(folder)
    assert not is_claimed(JobFolder(engine.outputs / "123456"))


def test_a_full_disk_is_told_before_the_run(make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as engine:
        slow, waiting = engine.submit(wants("slow")), engine.submit(wants("waiting"))
        until(lambda: slow.state == "running")
        monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 2**60)
        with pytest.raises(OutputError, match="free and this video may need"):
            engine.submit(wants("b"))
        group_log.let_go.set()
        slow.result(SECONDS)
        until(lambda: "free and this video may need" in waiting.view().waits_for)
        assert waiting.state == "queued" and waiting.view().position == 0
        monkeypatch.undo()
        waiting.result(60)
    assert one_end(waiting) is Finished and waiting.view().waits_for == ""


def test_resuming_asks_for_room_as_submitting_does(make: Make, group_log: GroupLog) -> None:
    with make(max_queue=2, max_per_owner=2) as engine:
        left = [_left_behind(engine, f"abcde{n}", owner="anna") for n in range(3)]
        for folder in left:
            folder.append(Failed(job_id=folder.job_id, kind="WorkerDied", message="rank 0 was killed"))
        running = engine.submit(wants("slow"), owner="anna")
        until(lambda: running.state == "running")
        first = engine.resume("abcde0")
        with pytest.raises(QueueFull, match="you have 2 jobs"):
            engine.resume("abcde1")
        engine.submit(wants("other"), owner="bert")
        first.cancel()
        engine.submit(wants("third"), owner="carl")
        with pytest.raises(QueueFull, match="2 jobs are waiting"):
            engine.resume("abcde1")
        assert isinstance(left[1].final_event(), Failed), "what was refused is as it was"
        group_log.let_go.set()
    later = make(max_queue=1, max_per_owner=1)
    again = [_left_behind(later, f"bbbbb{n}", owner="anna") for n in range(3)]
    assert {job.id for job in later.recover()} >= {folder.job_id for folder in again}, "these were taken once"


def test_resuming_asks_for_room_on_the_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 10**7)
    with make(max_disk_bytes=25 * 10**6) as engine:
        old = engine.submit(wants("old"))
        old.result(SECONDS)
        (old.folder.path / "video.mp4").write_bytes(b"x" * 14 * 10**6)
        mine = _left_behind(engine, "abcdef")
        mine.append(Failed(job_id="abcdef", kind="WorkerDied", message="rank 0 was killed"))
        (mine.path / "block_0000.ts").write_bytes(b"x" * 10**6)
        other = _left_behind(engine, "bbbbbb", dtype="bfloat16")
        with pytest.raises(RequestError, match="this engine runs"):
            engine.resume(other.job_id)
        assert old.folder.path.is_dir(), "nothing is deleted for a job that cannot go on"
        (old.folder.path / "video.mp4").write_bytes(b"x" * 17 * 10**6)
        old.folder.append(old.view().final)  # type: ignore[arg-type]  # its size is looked at again
        assert engine.resume("abcdef").result(SECONDS)
        assert not old.folder.path.exists() and mine.path.is_dir()


def test_a_quota_is_not_promised_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 10**7)
    with make(max_disk_bytes=25 * 10**6) as engine:
        slow = engine.submit(wants("slow"))
        engine.submit(wants("waits"))
        with pytest.raises(OutputError, match="promised to jobs that have not ended"):
            engine.submit(wants("too many"))
        assert len(list(engine.outputs.iterdir())) == 2
        slow.cancel()


def test_replicas_must_be_a_count(tiny: Path) -> None:
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(RequestError, match="replicas="):
            Engine(tiny, device="cpu", replicas=wrong)  # type: ignore[arg-type]


def _left_behind(engine: Engine, job_id: str, **about: Any) -> JobFolder:
    """A job as a killed program leaves it."""
    record = {"model": str(engine.checkpoint.folder), "dtype": engine.dtype, "threads": 1, **about}
    folder = JobFolder.create(engine.outputs, job_id, engine.resolve(wants("left behind")), **record)
    folder.append(Queued(job_id=job_id, position=0))
    return folder


def _ready(block: int) -> BlockReady:
    path = f"/old/place/block_{block:04d}.ts"
    return BlockReady(job_id="abcdef", block=block, path=path, first_frame=4 * block, num_frames=4, duration_s=1.0)


def test_interrupted_is_an_event_like_others() -> None:
    event = Interrupted(job_id="abcdef", kind="WorkerDied", message="rank 1 ended")
    assert event_from_json(event.to_json()) == event
