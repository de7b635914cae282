"""A job's history is one fold of its events: time without pauses, one state for all who look, small damage."""

from __future__ import annotations

import fcntl
import json
import os
import random
import stat
import threading
from pathlib import Path

import pytest

from dualparal.engine.engine import Engine
from dualparal.errors import DualParalError, OutputError
from dualparal.events import BlockReady, Cancelled, Finished, Interrupted, Queued, Started
from dualparal.jobs import claim as claims
from dualparal.jobs.claim import claim, is_claimed
from dualparal.jobs.facts import all_facts, read_history
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import fold
from dualparal.jobs.queue import JobQueue
from dualparal.jobs.storage import Storage, folder_bytes
from dualparal.jobs.timeline import read_timeline
from dualparal.planning.disk import bytes_needed
from dualparal.ui import snapshot
from tests.jobs.test_history import REQUEST, job

DAY_S = 86_400.0


def events(*reported: tuple[type, float, float | None], **_: object) -> list:
    about = {
        Queued: {"position": 0}, Started: {"num_blocks": 2, "num_items": 4, "num_frames": 17},
        BlockReady: {"block": 0, "path": "block_0000.ts", "first_frame": 0, "num_frames": 9, "duration_s": 0.5},
        Interrupted: {"kind": "EngineError", "message": "ended"}, Cancelled: {},
        Finished: {"path": "video.mp4", "num_frames": 17, "timings": {"total_s": 30.0}},
    }  # fmt: skip
    return [kind(job_id="abcdef", time_s=at_s, worked_s=worked_s, **about[kind]) for kind, at_s, worked_s in reported]


def test_a_night_between_two_runs_is_not_worked() -> None:
    old = [(Queued, 0, None), (Started, 100, None), (BlockReady, 110, None), (Cancelled, 120, None)]
    again = [(Queued, DAY_S, None), (Started, DAY_S + 50, None), (BlockReady, DAY_S + 55, None), (Finished, DAY_S + 60, None)]
    history = fold(events(*old, *again))  # type: ignore[arg-type]
    assert (history.state, history.worked_s, history.first_frames_s, history.num_frames) == ("finished", 30.0, 10.0, 9)


def test_a_clock_that_jumps_spoils_nothing() -> None:
    reported = [(Queued, 0, 0.0), (Started, 1, 0.0), (BlockReady, DAY_S, 4.0), (Finished, 3, 9.0)]
    history = fold(events(*reported))  # type: ignore[arg-type]
    assert (history.worked_s, history.is_timed, history.first_frames_s) == (9.0, True, 4.0)
    without = fold(events(*((kind, at_s, None) for kind, at_s, _ in reported)))  # type: ignore[arg-type]
    assert not without.is_timed, "an older journal whose times cannot be true teaches nothing"


def test_what_a_kill_left_unmeasured_teaches_nothing() -> None:
    reported = [(Queued, 0, 0.0), (Started, 1, 0.0), (Interrupted, DAY_S, 5.0), (Queued, DAY_S, 5.0), (Started, DAY_S, 5.0)]
    history = fold(events(*reported, (Finished, DAY_S + 9, 14.0)))  # type: ignore[arg-type]
    assert (history.worked_s, history.is_timed, history.num_interruptions) == (14.0, False, 1)


def test_page_and_command_line_agree_on_a_job_of_another_program(tmp_path: Path) -> None:
    folder = job(tmp_path, 1_000_000, "queued", "started", "block")
    folder.path.joinpath("request.json").write_text(_complete(folder))
    held = claim(folder)
    assert [facts.state for facts in all_facts(tmp_path)] == ["running"] == [snapshot.of_folder(folder).state]
    held.release()
    assert [facts.state for facts in all_facts(tmp_path)] == ["interrupted"] == [snapshot.of_folder(folder).state]


def test_a_listing_reads_two_files_of_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (job(tmp_path, 1_000_000 + number, "queued", "finished").path / "timeline.json").write_text("[]")
    read: list[str] = []
    for name in ("read_text", "read_bytes"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda path, *a, real=real, **k: read.append(path.name) or real(path, *a, **k))
    assert len(list(all_facts(tmp_path))) == 20
    assert sorted(set(read)) == ["events.jsonl", "request.json"] and len(read) == 40


def test_a_linked_video_counts_once(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(os.urandom(2**16))
    size = folder_bytes(tmp_path)
    (tmp_path / "dualparal-abcdef.mp4").hardlink_to(tmp_path / "video.mp4")
    assert folder_bytes(tmp_path) == size


def test_nobodys_video_goes_for_a_strangers_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 0)
    mine = job(tmp_path, 1_000_000, "queued", "finished", owner="anna", size=2**20)
    own = job(tmp_path, 1_000_001, "queued", "finished", owner="bert", size=2**20)
    storage = Storage(tmp_path, max_bytes=bytes_needed(REQUEST) + 2**20 + 2**17)
    assert storage.make_room(REQUEST, owner="bert") == [own.job_id], "the older one is somebody else's"
    tight = Storage(tmp_path, max_bytes=bytes_needed(REQUEST) + 2**18)
    with pytest.raises(OutputError, match="other people's"):
        tight.make_room(REQUEST, owner="carl")
    os.utime(mine.path / "events.jsonl", (0, 0))
    assert tight.make_room(REQUEST, owner="carl") == [mine.job_id], "but not for ever"


def test_a_job_that_waits_for_room_keeps_its_place() -> None:
    waiting: JobQueue[str] = JobQueue()
    waiting.push_first("first")
    waiting.push_first("second")
    taken = waiting.pop()
    assert taken == "first"
    waiting.put_back(taken)
    assert list(waiting) == ["first", "second"]


def test_a_child_between_fork_and_exec_holds_no_job(tmp_path: Path) -> None:
    """It has a copy of every descriptor, and a lock goes with the copies."""
    folder = job(tmp_path, 1_000_000, "queued")
    held = claim(folder)
    copy = os.dup(held._descriptor)  # type: ignore[arg-type]  # what a fork does
    held.release()
    assert not is_claimed(folder, num_tries=1)
    os.close(copy)


def test_a_dead_programs_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "NUM_TRIES", 5)
    folder = job(tmp_path, 1_000_000, "queued")
    descriptor = os.open(folder.path / "request.json", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(0.2, os.close, [descriptor]).start()
    claims.wait_for_leftovers([folder])
    assert not is_claimed(folder, num_tries=1)


@pytest.mark.parametrize("umask", [0, 0o022])
def test_files_are_their_owners_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = job(tmp_path / "outputs", 1_000_000, "queued")
    finally:
        os.umask(before)
    for path in (tmp_path / "outputs", folder.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in folder.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_damage_costs_a_jobs_details_and_nobodys_page(tmp_path: Path) -> None:
    """Flips, cuts, zeros, missing files and folders in their place, in all that is read: never anything but our own errors."""
    chance = random.Random(7)
    folder = job(tmp_path, 1_000_000, "queued", "started", "block", "finished")
    spans = [{"stage": "stage 0", "start_s": 0.0, "end_s": 1.0, "block": 0, "step": 1}]
    whole = {
        "request.json": _complete(folder).encode(), "timeline.json": json.dumps(spans).encode(),
        "events.jsonl": (folder.path / "events.jsonl").read_bytes(),
    }  # fmt: skip
    for _ in range(1_000):
        name = chance.choice(sorted(whole))
        path, data = folder.path / name, bytearray(whole[name])
        place = chance.randrange(len(data))
        match chance.randrange(5):
            case 0 | 1:
                data[place] ^= 1 << chance.randrange(8)
            case 2:
                del data[place:]
            case 3:
                data[place : place + 64] = bytes(len(data[place : place + 64]))
            case _:
                path.unlink()
        if path.exists():
            path.write_bytes(data)
        elif chance.random() < 0.5:
            path.mkdir()
        list(all_facts(tmp_path))
        try:
            found = snapshot.of_folder(folder)
            assert found.num_frames >= 0 or found.blocks
            read_timeline(folder.path)
        except DualParalError:
            pass
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole[name])
    assert read_history(folder)[1] == "finished" and read_timeline(folder.path)


def test_a_new_job_is_on_disk_before_the_dispatchers_lock_is_taken(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from tests.engine.test_serving import wants

    engine: Engine = make().start()
    held: list[bool] = []
    real = os.fsync
    lock = engine.dispatcher.changed

    def fsync(descriptor: int) -> None:
        taken: list[bool] = []
        other = threading.Thread(target=lambda: taken.append(_can_take(lock)))
        other.start()
        other.join()
        held.append(not taken[0])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    made = engine.submit(wants("quick"))
    assert held and not any(held) and made.state == "queued"


def _can_take(lock: object) -> bool:
    got = threading.Event()

    def take() -> None:
        with lock:  # type: ignore[attr-defined]
            got.set()

    threading.Thread(target=take, daemon=True).start()
    return got.wait(1.0)


def _complete(folder: JobFolder) -> str:
    about = {"fps": 16, "guidance_scale": 4.0, "seed": 1}
    record = folder.record()
    return json.dumps({**record, "request": {**record["request"], **about}})
