"""What a kill, a power cut or a full disk leaves between two steps on disk: a job that has ended, one that goes on, or none."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualparal.cli import generate as cli
from dualparal.cli.main import make_parser
from dualparal.engine.engine import Engine
from dualparal.errors import DualParalError, OutputError, RequestError
from dualparal.events import BlockReady, Cancelled, Failed, Finished, Queued, Started
from dualparal.files import STATE_FOLDER, is_whole_segment, replace_durably
from dualparal.jobs import folder as journal
from dualparal.jobs import recovery, storage
from dualparal.jobs.claim import claim, create_job, is_claimed
from dualparal.jobs.facts import read_facts
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.jobs.job import Job
from dualparal.media.metadata import describe
from dualparal.media.writer import VideoWriter, remove_partials
from dualparal.messages import CloseVideo, DecodeBlock, OpenVideo, RunJob, WorkerError
from dualparal.model import text_cache
from dualparal.ring.codec_process import OpenedVideo
from dualparal.ring.saved_sweeps import StateWriter
from dualparal.ui import snapshot
from dualparal.ui.studio import Studio
from tests.engine.test_serving import SECONDS, _left_behind, until, wants
from tests.fake_group import HALF_THE_FRAMES, NUM_FRAMES, GroupLog, Make
from tests.settings import settings


def started(folder: JobFolder) -> JobFolder:
    folder.append(Started(job_id=folder.job_id, num_blocks=1, num_items=1, num_frames=1))
    return folder


def ended(engine: Engine, name: str = "abcdef", num_pictures: int = 0) -> JobFolder:
    folder = started(_left_behind(engine, name, owner="anna"))
    folder.append(Finished(job_id=name, path=str(folder.video), num_frames=1, timings={}))
    folder.video.write_bytes(b"x")
    (folder.path / "frames").mkdir()
    for number in range(num_pictures):
        (folder.path / "frames" / f"{number:06d}.png").touch()
    return folder


# Deleting


def test_a_deletion_that_is_killed_leaves_no_job(make: Make) -> None:
    """A process that deletes is stopped again and again: whatever a kill would leave there is whole, or nobody's."""
    engine = make()
    names = [f"{number:06x}" for number in range(20)]
    for name in names:
        ended(engine, name, 200)
    child = os.fork()
    if child == 0:
        for name in names:
            JobFolder(engine.outputs / name).delete()
        os._exit(0)
    looks = 0
    while not os.waitpid(child, os.WNOHANG)[0]:
        os.kill(child, signal.SIGSTOP)
        for folder in list_jobs(engine.outputs):
            assert isinstance(folder.final_event(), Finished) and folder.video.is_file(), folder
        jobs = [path for path in engine.outputs.iterdir() if not path.name.startswith(".")]
        assert {path.name for path in jobs} == {folder.job_id for folder in list_jobs(engine.outputs)}
        looks += 1
        os.kill(child, signal.SIGCONT)
        time.sleep(0.0005)
    assert looks > 3 and not list(engine.outputs.iterdir())


def test_the_rest_of_a_deletion_is_cleared_away(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    folder = ended(engine)
    with monkeypatch.context() as patch:
        patch.setattr(journal.shutil, "rmtree", lambda *_, **__: None)  # killed here
        folder.delete()
    assert len(list(engine.outputs.iterdir())) == 1
    assert engine.recover() == [] and not list(engine.outputs.iterdir())


def test_nobody_deletes_what_another_program_runs(make: Make) -> None:
    engine = make()
    folder = started(_left_behind(engine, "abcdef", owner="anna"))
    held, studio = claim(folder), Studio(engine)
    with pytest.raises(RequestError, match="is running"):
        studio.delete("abcdef", "anna")
    held.release()
    studio.delete("abcdef", "anna")
    assert not folder.path.exists()


def test_the_quota_spares_what_is_resumed_meanwhile(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting takes seconds, and the next one on the list may go on by then."""
    engine = make()
    for name in ("aaaaaa", "bbbbbb"):
        folder = _left_behind(engine, name)
        folder.append(Failed(job_id=name, kind="WorkerDied", message="rank 0 was killed"))
        (folder.path / "block_0000.ts").write_bytes(b"x" * 10**6)
    held = []
    really = JobFolder.delete

    def delete(folder: JobFolder) -> None:
        if folder.job_id == "aaaaaa":
            held.append(claim(JobFolder(folder.path.parent / "bbbbbb")))
        really(folder)

    monkeypatch.setattr(JobFolder, "delete", delete)
    monkeypatch.setattr(storage, "bytes_needed", lambda request: 0)
    with pytest.raises(OutputError):
        storage.Storage(engine.outputs, 1).make_room(engine.resolve(wants("x")))
    held[0].release()
    assert [folder.job_id for folder in list_jobs(engine.outputs)] == ["bbbbbb"]


def test_the_quota_deletes_nothing_that_does_not_help(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    folder = ended(engine)
    (folder.path / "block_0000.ts").write_bytes(b"x" * 10**6)
    monkeypatch.setattr(storage, "bytes_needed", lambda request: 10**6)
    usage = shutil.disk_usage(engine.outputs)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=-(10**7)))
    with pytest.raises(OutputError, match="free and this video may need"):
        storage.Storage(engine.outputs, 10**6).make_room(engine.resolve(wants("x")))
    assert folder.path.is_dir()


@pytest.mark.parametrize("deed", ["submit", "compare"])
def test_a_program_that_starts_this_moment_takes_no_new_job(
    deed: str,
    make: Make,
    group_log: GroupLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks as soon as the job has its name, before its maker could claim it."""
    replace, found = os.replace, []
    with make() as engine:

        def and_look(partial: Path, path: Path) -> None:
            replace(partial, path)
            if path.name == "request.json":
                found.append([one.job_id for one in recovery.cut_off(engine.outputs)])
                found.append(JobFolder(path.parent).events())

        monkeypatch.setattr(os, "replace", and_look)
        job = engine.submit(wants("slow")) if deed == "submit" else engine.compare(wants("slow"))
        assert found == [[], []]
        assert is_claimed(job.folder)
        job.cancel()
        until(lambda: job.has_ended)
        until(lambda: not is_claimed(job.folder))


def test_a_job_that_could_not_be_made_holds_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def full(partial: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        create_job(tmp_path, "abcdef", wants("x"))
    assert len(os.listdir("/proc/self/fd")) == before and not list(tmp_path.iterdir())


# The end of a job


def test_saved_sweeps_stay_while_the_end_is_not_written_down(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    really, is_full = JobFolder.append, [True]

    def append(folder: JobFolder, event: Any) -> None:
        if isinstance(event, Finished) and is_full[0]:
            raise OutputError("the disk is full")
        really(folder, event)

    with make() as engine:
        monkeypatch.setattr(JobFolder, "append", append)
        job = engine.submit(wants("quick"))
        (job.folder.path / STATE_FOLDER).mkdir()
        job.result(SECONDS)
        assert job.folder.final_event() is None and (job.folder.path / STATE_FOLDER).is_dir()
        is_full[0] = False
        until(lambda: job.folder.final_event() is not None)
        until(lambda: not (job.folder.path / STATE_FOLDER).exists())


def test_a_stop_that_comes_too_late_for_the_program_holds_after_it(make: Make, group_log: GroupLog) -> None:
    engine = make(auto_resume=True).start()
    job = engine.submit(wants("slow"))
    until(lambda: len(job.view().blocks) == 2)
    group_log.is_deaf = True
    job.cancel()
    assert job.state == "running" and job.folder.stop_wish.is_file()
    engine.close()
    final = job.folder.final_event()
    assert isinstance(final, Cancelled) and final.path and make().recover() == []
    assert not job.folder.stop_wish.exists()


def test_a_stop_holds_after_a_kill_of_everything(make: Make) -> None:
    engine = make()
    folder = started(_left_behind(engine, "abcdef"))
    folder.stop_wish.touch()
    assert engine.recover() == []
    assert isinstance(folder.final_event(), Cancelled) and not folder.stop_wish.exists()
    job = engine.resume("abcdef")
    assert job.state == "queued" and engine.recover() == []


class Decoder:
    on_frame = None

    def begin(self) -> None: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 3, 4, 32, 32)


class Nobody:
    def send(self, message: object) -> None: ...


def decoded(folder: Path, num_blocks: int, *, is_resumed: bool) -> Any:
    """What the codec says of a video that was stopped after so many blocks."""
    run = RunJob("abcdef", settings(latents_num=5, height=32, width=32, fps=16), str(folder), is_resumed=is_resumed)
    video = OpenedVideo(OpenVideo(run, 32, 32), Decoder(), Nobody())  # type: ignore[arg-type]
    for block in range(num_blocks):
        video.add(DecodeBlock("abcdef", block, np.zeros((1, 16, 1, 4, 4), np.float32)))
    return video.close(CloseVideo("abcdef", True, {}))


def test_a_second_stop_keeps_what_the_first_had(make: Make, group_log: GroupLog) -> None:
    """Resumed from an early sweep and stopped at once: every block that was ever finished is in the mp4."""
    with make() as engine:
        job = engine.submit(wants("slow"))
        until(lambda: len(job.view().blocks) == 2)
        job.cancel()
        until(lambda: job.has_ended)
        first = job.folder.final_event()
        assert isinstance(first, Cancelled) and first.num_frames == HALF_THE_FRAMES
        group_log.slow_at = 1
        again = engine.resume(job.id)
        until(lambda: again.state == "running")
        again.cancel()
        until(lambda: again.has_ended)
    second = job.folder.final_event()
    assert isinstance(second, Cancelled) and second.num_frames == HALF_THE_FRAMES


def test_a_job_given_up_at_a_start_keeps_its_blocks(make: Make) -> None:
    engine = make()
    folder = started(_left_behind(engine, "abcdef", has_tensors=True))
    writer = VideoWriter(folder.path, width=32, height=32, fps=16)
    segment = writer.add_block(np.zeros((4, 32, 32, 3), np.uint8))
    reported = BlockReady(job_id="abcdef", block=0, path=str(segment.path), first_frame=0, num_frames=4, duration_s=0.25)
    folder.append(reported)
    assert engine.recover() == []
    final = folder.final_event()
    assert isinstance(final, Failed) and final.path and describe(Path(final.path))["num_frames"] == final.num_frames == 4


def test_the_codec_joins_what_it_was_given(tmp_path: Path) -> None:
    """Why the front end has to look: it alone knows of the blocks of the run before."""
    assert decoded(tmp_path, 5, is_resumed=False).num_frames == 20
    assert decoded(tmp_path, 2, is_resumed=True).num_frames == 8


def test_workers_that_end_while_the_engine_closes_cut_the_job_off(make: Make, group_log: GroupLog) -> None:
    """A service manager's SIGTERM may reach them first."""
    engine = make(auto_resume=True).start()
    job = engine.submit(wants("slow"))
    until(lambda: len(job.view().blocks) == 2)
    with engine.dispatcher.changed:
        engine.dispatcher.is_closing = True  # as `close` does first
        group_log.groups[0].kill()
    engine.close()
    assert job.folder.final_event() is None and [one.id for one in make().recover()] == [job.id]


def test_a_job_nobody_is_left_to_run_keeps_its_blocks(make: Make, group_log: GroupLog) -> None:
    with make(auto_resume=True) as engine:
        engine.submit(wants("before")).result(SECONDS)
        group_log.start_errors = [WorkerError("rank 0", "CheckpointError", "gone")]
        job = engine.submit(wants("die"))
        with pytest.raises(DualParalError):
            job.result(SECONDS)
        final = job.view().final
        assert isinstance(final, Failed) and final.path and final.num_frames == HALF_THE_FRAMES


def test_interruptions_count_from_the_last_end(make: Make) -> None:
    engine = make()
    folder = _left_behind(engine, "abcdef")
    for _ in range(recovery.MAX_INTERRUPTIONS + 1):
        started(folder)
        list(recovery.cut_off(engine.outputs))
    assert isinstance(folder.final_event(), Failed)
    folder.append(Queued(job_id="abcdef", position=0))  # resumed by hand
    started(folder)
    assert [found.job_id for found in recovery.cut_off(engine.outputs)] == ["abcdef"]


# A full disk


def test_one_full_moment_fails_nobody(make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as engine:
        slow = engine.submit(wants("slow"))
        until(lambda: slow.state == "running")
        jobs = [engine.submit(wants(f"waits {number}")) for number in range(4)]
        usage = shutil.disk_usage(engine.outputs)
        with monkeypatch.context() as patch:
            patch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=0))
            group_log.let_go.set()
            slow.result(SECONDS)
            until(lambda: jobs[0].view().waits_for)
            assert [job.state for job in jobs] == ["queued"] * 4 and not jobs[1].view().waits_for
            assert "free and this video may need" in snapshot.of_job(jobs[0]).waits_for
        for job in jobs:
            job.result(60)


def test_a_restart_on_a_full_disk_fails_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    folders = [started(_left_behind(engine, f"aaaaa{number}")) for number in range(3)]
    usage = shutil.disk_usage(engine.outputs)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=0))
    engine.start()
    found = engine.recover()
    until(lambda: found[0].view().waits_for)
    assert not any(folder.final_event() for folder in folders)


# Power cuts


def test_names_come_after_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses power keeps what was synced before: the bytes, then the name, then what relies on both."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def synced(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"name {Path(b).name}"), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (seen.append(f"move {self.name}"), rename(self, to))[1])
    folder = JobFolder.create(tmp_path, "abcdef", wants("x"))
    assert seen == ["sync .request.json.part", "name request.json", "sync abcdef"]
    seen.clear()
    writer = VideoWriter(folder.path, width=32, height=32, fps=16)
    writer.add_block(np.zeros((4, 32, 32, 3), np.uint8))
    assert seen == ["sync .block_0000.ts.part", "name block_0000.ts", "sync abcdef"]
    seen.clear()
    writer.finish("{}")
    assert seen[-3][:11] == "sync .video" and seen[-2:] == ["name video.mp4", "sync abcdef"]
    seen.clear()
    folder.append(Started(job_id="abcdef", num_blocks=1, num_items=1, num_frames=1))
    assert seen == []
    folder.append(Finished(job_id="abcdef", path="video.mp4", num_frames=4, timings={}))
    assert seen == ["sync events.jsonl"]


def test_a_torn_segment_is_made_again(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    first = VideoWriter(tmp_path, width=32, height=32, fps=16)
    whole = [first.add_block(frames).path.read_bytes() for _ in range(2)]
    for torn in (b"", whole[1][:100], whole[1][:-1]):
        (tmp_path / "block_0001.ts").write_bytes(torn)
        assert not is_whole_segment(tmp_path / "block_0001.ts")
        writer = VideoWriter(tmp_path, width=32, height=32, fps=16)
        assert writer.adopt_block(frames) is not None and writer.adopt_block(frames) is None
        assert writer.add_block(frames).path.read_bytes() == whole[1]
        assert writer.finish("{}") is not None


def test_a_finished_job_with_a_torn_video_may_go_on(make: Make) -> None:
    with make() as engine:
        job = engine.submit(wants("quick"))
        job.result(SECONDS)
        with pytest.raises(RequestError, match="has finished"):
            engine.resume(job.id)
        job.folder.video.write_bytes(b"")
        engine.resume(job.id).result(SECONDS)
        assert describe(job.folder.video)["num_frames"] == NUM_FRAMES


def test_replacing_needs_no_folder_that_can_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuses_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError("not here")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    (tmp_path / "a").write_text("new")
    replace_durably(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


# What cannot be read


def test_one_unreadable_journal_stops_nobody_else(make: Make) -> None:
    engine = make(max_disk_bytes=10**9)
    bad = _left_behind(engine, "abcdef")
    (bad.path / "events.jsonl").unlink(missing_ok=True)
    (bad.path / "events.jsonl").mkdir()
    good = started(_left_behind(engine, "bbbbbb"))
    assert [job.id for job in engine.recover()] == [good.job_id]
    with engine:
        engine.submit(wants("x")).result(SECONDS)


def test_resume_last_means_one_that_can_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    started(_left_behind(engine, "aaaaaa"))
    (_left_behind(engine, "bbbbbb").path / "request.json").write_bytes(b"")
    _left_behind(engine, "cccccc", baseline=True)
    held = claim(_left_behind(engine, "dddddd"))
    meant: list[str] = []

    def engine_of(options: argparse.Namespace, **recorded: Any) -> Any:
        raise RequestError("seen")

    monkeypatch.setattr(cli, "make_engine", engine_of)
    monkeypatch.setattr(cli.JobFolder, "record", _noting(cli.JobFolder.record, meant))
    options = make_parser().parse_args(["resume", "last", "--outputs", str(engine.outputs)])
    with pytest.raises(RequestError, match="seen"):
        cli.run_resume(options)
    assert meant[-1] == "aaaaaa"
    held.release()


def _noting(really: Callable[[JobFolder], Any], names: list[str]) -> Callable[[JobFolder], Any]:
    def noted(folder: JobFolder) -> Any:
        names.append(folder.job_id)
        return really(folder)

    return noted


def test_page_and_registry_agree_on_a_job_cut_off_after_a_resume(make: Make) -> None:
    folder = _left_behind(make(), "abcdef", owner="anna")
    folder.append(Failed(job_id="abcdef", kind="WorkerDied", message="old"))
    folder.append(Queued(job_id="abcdef", position=0))
    started(folder)
    assert snapshot.of_folder(folder).state == read_facts(folder).state == "interrupted"


# What is left lying about


def test_halves_of_saved_sweeps_go(tmp_path: Path) -> None:
    names = (".latents_0017.safetensors.part", ".sweep.safetensors.part")
    state = tmp_path / STATE_FOLDER
    for clear in (lambda: remove_partials(tmp_path), lambda: StateWriter(state).close()):
        state.mkdir(exist_ok=True)
        for name in names:
            (state / name).touch()
        clear()
        assert not list(state.iterdir())


def test_old_halves_of_embeddings_go(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.safetensors.0.part", tmp_path / ".b.safetensors.1.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 2 * text_cache.PARTIAL_LASTS_S,) * 2)
    text_cache.EmbeddingCache(tmp_path).store("c", torch.zeros(1, 2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "c.safetensors"]


def test_a_comparison_without_an_engine_claims_its_job(make: Make, group_log: GroupLog) -> None:
    """As `generate --baseline wan` runs it."""
    engine = make()
    job = engine.compare(wants("slow"), job_id="abcdef")
    until(lambda: job.state == "running")
    assert is_claimed(job.folder) and list(recovery.cut_off(engine.outputs)) == []  # a server starts on the same folder
    assert job.folder.final_event() is None
    group_log.let_go.set()
    job.result(SECONDS)
    assert not is_claimed(job.folder)


def test_the_codec_makes_no_folder_of_a_deleted_job(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is gone"):
        decoded(tmp_path / "abcdef", 1, is_resumed=False)
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """Nothing catches it, and nothing reaches the disk after it."""


@pytest.mark.parametrize("deed", ["finish", "delete"])
def test_a_kill_before_any_step_on_disk(deed: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every k the k-th step and all after it never happen. A new program finds a job that has ended with its video, one
    that goes on from all it had saved, or none."""
    saved = {f"latents_{block:04d}.safetensors" for block in range(3)} | {"sweep.safetensors"}
    for last in range(200):
        engine = make()
        folder = started(_left_behind(engine, f"{last:06x}"))
        writer = VideoWriter(folder.path, width=32, height=32, fps=16)
        writer.add_block(np.zeros((4, 32, 32, 3), np.uint8))
        (folder.path / STATE_FOLDER).mkdir()
        for name in saved:
            (folder.path / STATE_FOLDER / name).touch()
        finished = Finished(job_id=folder.job_id, path=str(folder.video), num_frames=4, timings={})
        if deed == "delete":
            writer.finish("{}")
            folder.append(finished)
        is_over = True
        with monkeypatch.context() as patch:
            _die_before(patch, last)
            try:
                if deed == "delete":
                    folder.delete()
                else:
                    writer.finish("{}")
                    Job(RunJob(folder.job_id, wants("x"), str(folder.path)), folder, "", lambda _: None).emit(finished)
            except Killed:
                is_over = False
        left = [found.job_id for found in recovery.cut_off(engine.outputs)]
        there = [found.job_id for found in list_jobs(engine.outputs)]
        if left:
            assert deed == "finish" and {path.name for path in (folder.path / STATE_FOLDER).iterdir()} == saved
            assert is_whole_segment(folder.path / "block_0000.ts") and folder.final_event() is None
        elif there:
            assert isinstance(folder.final_event(), Finished) and describe(folder.video)["num_frames"] == 4
            assert deed == "delete" or not (folder.path / STATE_FOLDER).exists()
        else:
            assert deed == "delete" and not list(engine.outputs.iterdir())
        if is_over:
            break
        shutil.rmtree(engine.outputs)
    assert 8 < last < 199, "steps were watched, and it came to an end"


def _die_before(patch: pytest.MonkeyPatch, last: int) -> None:
    """From the step numbered `last` on no step on disk happens any more."""
    steps = itertools.count()

    def mortal(really: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            if next(steps) >= last:
                raise Killed
            return really(*given, **named)

        return step

    for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
        patch.setattr(os, name, mortal(getattr(os, name)))
    patch.setattr(JobFolder, "append", mortal(JobFolder.append))
