"""What is told of jobs from their folders alone, and room kept on the disk."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dualparal.cli.main import main
from dualparal.errors import OutputError
from dualparal.events import BlockReady, Cancelled, Failed, Finished, Interrupted, Queued, Started
from dualparal.jobs.claim import claim
from dualparal.jobs.facts import all_facts, list_facts, read_facts
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.jobs.storage import Storage, folder_bytes
from dualparal.planning.disk import RESERVE_BYTES, bytes_needed, sweep_bytes
from tests.settings import settings

REQUEST = settings(
    prompt="a fox", latents_num=5, height=32, width=32, num_per_block=3, num_cat=1, num_inference_steps=4, schedule="paper"
)
SMALL = REQUEST.model_copy(update={"latents_num": 1})


def job(outputs: Path, number: int, *events: str, owner: str = "anna", prompt: str = "a fox", size: int = 0) -> JobFolder:
    name = f"{number:06x}"
    folder = JobFolder.create(outputs, name, REQUEST.model_copy(update={"prompt": prompt}), model="pocket", owner=owner)
    made = {
        "queued": Queued(job_id=name, position=0),
        "started": Started(job_id=name, num_blocks=2, num_items=4, num_frames=17),
        "block": BlockReady(job_id=name, block=0, path="x", first_frame=0, num_frames=9, duration_s=0.5),
        "interrupted": Interrupted(job_id=name, kind="WorkerDied", message="rank 1 ended"),
        "finished": Finished(job_id=name, path="x", num_frames=17, timings={"total_s": 2.0}),
        "failed": Failed(job_id=name, kind="WorkerDied", message="rank 1 \x1b[2Jended"),
        "cancelled": Cancelled(job_id=name),
    }
    for event in events:
        folder.append(made[event])
    if size:
        (folder.path / "video.mp4").write_bytes(os.urandom(size))
    return folder


def ids(outputs: Path) -> list[str]:
    return sorted(folder.job_id for folder in list_jobs(outputs))


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "interrupted"),
        (("queued",), "interrupted"),
        (("queued", "started", "block"), "interrupted"),
        (("queued", "started", "block", "block", "finished"), "finished"),
        (("queued", "started", "failed"), "failed"),
        (("queued", "cancelled"), "cancelled"),
        (("queued", "started", "cancelled", "queued"), "interrupted"),
        (("queued", "started", "cancelled", "queued", "started", "finished"), "finished"),
    ],
)
def test_states(tmp_path: Path, events: tuple[str, ...], state: str) -> None:
    folder = job(tmp_path, 1_000_000, *events)
    assert read_facts(folder).state == state
    held = claim(folder)
    expected = "running" if events and "started" in events[-2:] else "queued"
    assert read_facts(folder).state == (expected if state == "interrupted" else state)
    held.release()
    assert read_facts(folder).state == state


def test_facts(tmp_path: Path) -> None:
    events = ("queued", "started", "block", "interrupted", "queued", "started", "block", "finished")
    facts = read_facts(job(tmp_path, 1_000_000, *events))
    assert (facts.num_frames, facts.num_frames_asked, facts.num_interruptions, facts.owner) == (9, 17, 1, "anna")
    assert facts.timings == {"total_s": 2.0} and facts.error is None and 0 <= facts.age_s < 60
    assert json.loads(json.dumps(facts.to_json()))["state"] == "finished"


def test_pages_are_newest_first_and_owners_apart(tmp_path: Path) -> None:
    for number in range(10):
        end, owner = "finished" if number % 2 else "failed", "anna" if number < 7 else "bert"
        job(tmp_path, 1_000_000 + number, "queued", end, owner=owner)
    (tmp_path / "0f4248" / "request.json").write_text("[")  # of somebody else, or torn
    numbers = [int(facts.job_id, 16) - 1_000_000 for facts in all_facts(tmp_path)]
    assert numbers == [9, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [int(f.job_id, 16) - 1_000_000 for f in list_facts(tmp_path, owner="anna", skip=1, limit=2)] == [5, 4]
    assert [f.state for f in list_facts(tmp_path, owner="bert", states=["failed"])] == []
    assert list_facts(tmp_path / "missing") == []


def test_jobs_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path, 1_000_001, "queued", "failed", prompt="clear\nthe screen \u202e" + "x" * 100)
    job(tmp_path, 1_000_002, "queued", "started", "block")
    assert main(["jobs", "--outputs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0f4242", "interrupted"], ["0f4241", "failed"]]
    assert "9/17 frames" in lines[0] and "rank 1 \\x1b[2Jended" in lines[1]
    assert all(line.isprintable() and len(line) < 160 for line in lines)
    assert main(["jobs", "--outputs", str(tmp_path), "--json", "--state", "failed"]) == 0
    assert [json.loads(line)["job_id"] for line in capsys.readouterr().out.splitlines()] == ["0f4241"]
    assert main(["jobs", "--outputs", str(tmp_path / "none")]) == 0


def test_a_quota_takes_the_oldest_ended_jobs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 0)
    mb = 2**20
    job(tmp_path, 1_000_000, "queued", "started", size=mb)  # cut off: stays
    held = claim(job(tmp_path, 1_000_001, "queued", "finished", "queued", size=mb))  # waits again: stays
    for number in range(2, 8):
        job(tmp_path, 1_000_000 + number, "queued", "finished" if number % 2 else "cancelled", size=mb)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x" * mb)
    storage = Storage(tmp_path, max_bytes=bytes_needed(REQUEST) + 5 * mb + 200_000)
    deleted = storage.make_room(REQUEST, {"0f4242": SMALL}, owner="anna")
    assert deleted == ["0f4243", "0f4244", "0f4245"]
    left = ["0f4240", "0f4241", "0f4242", "0f4246", "0f4247"]
    assert ids(tmp_path) == left
    assert storage.make_room(REQUEST, owner="anna") == []
    # What cannot be given room costs nobody a video: two megabytes belong to jobs that have not ended.
    with pytest.raises(OutputError, match="2 MB are in use or promised"):
        Storage(tmp_path, max_bytes=bytes_needed(REQUEST) + mb).make_room(REQUEST, owner="anna")
    assert ids(tmp_path) == left
    with pytest.raises(OutputError, match="more than all videos kept here may take together"):
        Storage(tmp_path, max_bytes=bytes_needed(REQUEST) - 1).make_room(REQUEST, owner="anna")
    assert ids(tmp_path) == left
    assert (tmp_path / "precious" / "file").is_file()
    held.release()


def test_a_quota_counts_what_open_jobs_will_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 2**25)
    needed = bytes_needed(REQUEST)
    storage = Storage(tmp_path, max_bytes=int(2.5 * needed))
    job(tmp_path, 1_000_000, "queued", "finished", size=2**20)
    assert storage.make_room(REQUEST, {"0f4241": REQUEST}, owner="anna") == []
    with pytest.raises(OutputError, match="try again later"):
        storage.make_room(REQUEST, {"0f4241": REQUEST, "0f4242": REQUEST}, owner="anna")
    assert ids(tmp_path) == ["0f4240"]
    # What an open job has written already is not counted twice.
    job(tmp_path, 1_000_001, "queued", "started", size=needed // 2)
    assert storage.make_room(REQUEST, {"0f4241": REQUEST}, owner="anna") == []
    # A job that is queued again keeps what it has, and needs only the rest.
    job(tmp_path, 1_000_002, "queued", "failed", size=needed // 2)
    assert storage.make_room(REQUEST, {"0f4241": REQUEST}, job_id="0f4242") == []
    assert ids(tmp_path) == ["0f4240", "0f4241", "0f4242"]


def test_a_job_that_was_resumed_is_measured_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path, max_bytes=2**22 + bytes_needed(REQUEST))
    folder = job(tmp_path, 1_000_000, "queued", "finished", size=1000)
    assert storage.make_room(REQUEST, owner="anna") == []
    (folder.path / "video.mp4").write_bytes(os.urandom(2**23))
    folder.append(Cancelled(job_id="0f4240"))
    assert storage.make_room(REQUEST, owner="anna") == ["0f4240"]


def test_no_limit_deletes_nothing_and_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(tmp_path, 1_000_000, "queued", "finished", size=1000)
    assert Storage(tmp_path).make_room(REQUEST, owner="anna") == []
    assert Storage(tmp_path / "not" / "yet").make_room(REQUEST, owner="anna") == []
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 2**60)
    with pytest.raises(OutputError, match=r"free and this video may need [\d,]+ MB"):
        Storage(tmp_path).make_room(REQUEST, owner="anna")
    assert len(list(list_jobs(tmp_path))) == 1


def test_needs_hold_two_saved_sweeps() -> None:
    """`paper` at 480p with 50 blocks of 8 in flight: 50 x 8 latent frames of 0.4 MB, four times, and the neighbours' ends."""
    large = {"latents_num": 500, "height": 480, "width": 832, "num_per_block": 8, "num_cat": 8, "num_inference_steps": 50}
    request = settings(**large)
    assert 4 * 49 * 8 * 399_360 < sweep_bytes(request) < 2.5 * 640e6
    few = request.model_copy(update={"schedule": "preview", "max_in_flight": 3, "stagger": 16})
    assert 3 * 8 * 4 * 400e3 < sweep_bytes(few) < sweep_bytes(request) / 5
    assert bytes_needed(request) - bytes_needed(few) == 2 * (sweep_bytes(request) - sweep_bytes(few))


def test_needs_grow_with_the_video() -> None:
    longer = REQUEST.model_copy(update={"latents_num": 50})
    assert RESERVE_BYTES < bytes_needed(REQUEST) < bytes_needed(longer)
    minute = REQUEST.model_copy(update={"latents_num": 241, "height": 480, "width": 832})
    assert 100e6 < bytes_needed(minute) - 2 * sweep_bytes(minute) < 1e9


def test_sizes_do_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"x" * 8192)
    size = folder_bytes(tmp_path)
    (tmp_path / "inner" / "loop").symlink_to(tmp_path)
    assert size >= 8192 and folder_bytes(tmp_path) - size < 8192
    assert folder_bytes(tmp_path / "gone") == 0


def test_listing_many_is_quick(tmp_path: Path) -> None:
    for number in range(300):
        job(tmp_path, 1_000_000 + number, "queued", "finished")
    started_s = time.monotonic()
    assert len(list_facts(tmp_path, limit=10)) == 10
    assert time.monotonic() - started_s < 2.0
