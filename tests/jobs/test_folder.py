"""A job's folder survives crashes, strange ids and strange neighbours."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from pathlib import Path

import pytest

from dualparal.errors import OutputError, RequestError
from dualparal.events import BlockReady, Cancelled, Event, Failed, Finished, Progress, Queued, Started, event_from_json
from dualparal.files import write_atomically
from dualparal.jobs.folder import (
    JobFolder,
    check_job_id,
    find_job,
    list_jobs,
    new_job_id,
    outputs_folder,
)
from tests.settings import settings

REQUEST = settings(prompt="a fox \u2028 日本" * 10, seed=3, latents_num=5)
EVENTS: list[Event] = [
    Queued(job_id="abc-123", position=2),
    Started(job_id="abc-123", num_blocks=2, num_items=20, num_frames=17),
    Progress(job_id="abc-123", items_done=1, num_items=20, num_steps=10, block_steps=(1, 0), busy=(0.5,)),
    BlockReady(job_id="abc-123", block=0, path="x\u2028\x85\x0b é\n.ts", first_frame=0, num_frames=9, duration_s=0.5625),
    Failed(job_id="abc-123", kind="WorkerDied", message="rank 1 ended\nwith -9"),
    Cancelled(job_id="abc-123"),
    Started(job_id="abc-123", num_blocks=2, num_items=20, num_frames=17, notice="the prompt “日本” is cut"),
    Finished(job_id="abc-123", path="video.mp4", num_frames=17, timings={"total_s": 1.5}),
]


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return JobFolder.create(tmp_path / "outputs", "abc-123", REQUEST, model="pocket", owner="anna")


def test_a_journal_from_before_there_were_notices() -> None:
    record = {"event": "Started", "job_id": "abc-123", "time_s": 1.0, "num_blocks": 2, "num_items": 20, "num_frames": 17}
    assert event_from_json(record) == Started(job_id="abc-123", time_s=1.0, num_blocks=2, num_items=20, num_frames=17)


def test_ids_are_well_formed_unique_and_sort_by_time() -> None:
    ids = []
    for _ in range(20):
        ids.append(new_job_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len(set(ids)) == 20
    assert all(check_job_id(job_id) == job_id for job_id in ids)


@pytest.mark.parametrize(
    "job_id",
    ["", "abc", "ABCDEF", "abcdeg", "../../etc", "..", "a/bcdef", "abc\0def", "abcdef\n", "a" * 37, "abc def", ".abcdef", None,
     5, b"abcdef", ["abcdef"], "ａｂｃｄｅｆ", "١٢٣٤٥٦", "C:abcdef"],
)  # fmt: skip
def test_malformed_ids_touch_nothing(tmp_path: Path, job_id: object) -> None:
    for attempt in (
        lambda: check_job_id(job_id),
        lambda: find_job(tmp_path, job_id),
        lambda: JobFolder.create(tmp_path, job_id, REQUEST),  # type: ignore[arg-type]
    ):
        with pytest.raises(RequestError, match="6 to 36 lower-case hexadecimal") as caught:
            attempt()
        assert caught.value.field == "job_id"
    assert list(tmp_path.iterdir()) == []


def test_unknown_id(tmp_path: Path) -> None:
    (tmp_path / "abcdef").mkdir()
    for job_id in ("abcdef", "123456"):
        with pytest.raises(RequestError, match=f"there is no job {job_id}"):
            find_job(tmp_path, job_id)


def test_record_and_request(job: JobFolder) -> None:
    found = find_job(job.path.parent, "abc-123")
    assert found == job
    assert found.request() == REQUEST
    record = found.record()
    assert (record["job_id"], record["model"], record["owner"]) == ("abc-123", "pocket", "anna")
    assert abs(record["created_s"] - time.time()) < 60
    assert [path.name for path in job.path.iterdir()] == ["request.json"]


def test_a_job_is_not_created_twice(job: JobFolder) -> None:
    with pytest.raises(OutputError, match="already"):
        JobFolder.create(job.path.parent, "abc-123", settings(prompt="other"))
    assert job.request() == REQUEST


def test_create_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="DUALPARAL_OUTPUTS") as caught:
        JobFolder.create(tmp_path / "file" / "outputs", "abc-123", REQUEST)
    assert "\n" not in str(caught.value)


def test_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    job = JobFolder.create(tmp_path, "abc-123", REQUEST)
    job.append(EVENTS[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        with pytest.raises(OutputError, match="results cannot be written"):
            JobFolder.create(tmp_path, "abc-456", REQUEST)
        with pytest.raises(OutputError, match=r"events\.jsonl cannot be written"):
            for _ in range(3):
                job.append(EVENTS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["abc-123"], "no half-made job is left"
    job.append(EVENTS[-1])  # room again
    assert job.events()[0] == EVENTS[0]
    assert job.final_event() == EVENTS[-1]


def test_events_round_trip_without_progress(job: JobFolder) -> None:
    assert job.events() == []
    for event in EVENTS:
        job.append(event)
    assert job.events() == [event for event in EVENTS if not isinstance(event, Progress)]
    assert job.final_event() == EVENTS[-1]
    assert len((job.path / "events.jsonl").read_bytes().splitlines()) == len(EVENTS) - 1


@pytest.mark.parametrize("event", EVENTS)
def test_events_are_json(event: Event) -> None:
    assert event_from_json(json.loads(json.dumps(event.to_json()))) == event


def test_torn_last_line_at_every_byte(job: JobFolder) -> None:
    job.append(EVENTS[0])
    whole = (job.path / "events.jsonl").read_bytes()
    job.append(EVENTS[3])
    both = (job.path / "events.jsonl").read_bytes()
    for end in range(len(whole), len(both) + 1):
        (job.path / "events.jsonl").write_bytes(both[:end])
        survived = EVENTS[:1] + (EVENTS[3:4] if end >= len(both) - 1 else [])
        assert job.events() == survived, end
        job.append(EVENTS[-1])  # after the crash: must not be glued to the torn line
        assert job.events() == [*survived, EVENTS[-1]], end


def test_strange_lines_are_skipped(job: JobFolder) -> None:
    job.append(EVENTS[0])
    with (job.path / "events.jsonl").open("ab") as lines:
        lines.write(
            b'\n\xff\xfe\n[]\n5\nnull\n"x"\n{}\n{"event": "Nope"}\n{"event": "Queued"}\n[[1, 2]]\n' + b"[" * 20_000 + b"\n"
        )
        lines.write(b'{"event": "Queued", "job_id": "abc-123", "position": 1, "extra": 2}\n')
        lines.write(b'{"event": "Progress", "job_id": "a", "block_steps": 5}\n')
    job.append(EVENTS[-1])
    assert job.events() == [EVENTS[0], EVENTS[-1]]


def _append_many(path: Path, number: int) -> None:
    for position in range(200):
        JobFolder(path).append(Queued(job_id=f"{number:06d}", position=position))


def test_appending_from_several_processes(job: JobFolder) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(job.path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    found = job.events()
    assert len(found) == 600
    for number in range(3):
        mine = [event.position for event in found if isinstance(event, Queued) and event.job_id == f"{number:06d}"]
        assert mine == list(range(200))


def test_final_event(job: JobFolder) -> None:
    assert job.final_event() is None
    for event in (EVENTS[0], EVENTS[5], EVENTS[3]):
        job.append(event)
    assert job.final_event() == EVENTS[5]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"request": 5}', "{}", "[" * 50_000])
def test_damaged_request(job: JobFolder, text: str) -> None:
    (job.path / "request.json").write_text(text)
    with pytest.raises(OutputError, match="abc-123") as caught:
        job.request()
    assert "\n" not in str(caught.value)
    (job.path / "request.json").write_text('{"request": {"prompt": "x", "seed": -1}}')
    with pytest.raises(RequestError, match="seed=-1"):
        job.request()


def test_segments_in_order_of_blocks(job: JobFolder) -> None:
    names = ["block_0000.ts", "block_0001.ts", "block_0010.ts", "block_9999.ts", "block_10000.ts"]
    for name in [*reversed(names), ".block_0002.ts.part", "block_x.ts", "block_0003.ts.bak", "block_.ts"]:
        (job.path / name).touch()
    assert [path.name for path in job.segments()] == names


def test_listing_is_newest_first_and_leaves_others_alone(tmp_path: Path) -> None:
    ids = []
    for _ in range(4):
        ids.append(new_job_id())
        JobFolder.create(tmp_path, ids[-1], REQUEST)
        time.sleep(0.002)
    (tmp_path / "notes").mkdir()
    (tmp_path / "abcdef").mkdir()  # no request.json
    (tmp_path / "fedcba").touch()
    (tmp_path / "UPPER1").mkdir()
    (tmp_path / "UPPER1" / "request.json").touch()
    assert [job.job_id for job in list_jobs(tmp_path)] == ids[::-1]
    assert list(list_jobs(tmp_path / "missing")) == []
    assert list(list_jobs(tmp_path / "fedcba")) == []


def test_delete(job: JobFolder) -> None:
    (job.path / "frames").mkdir()
    (job.path / "frames" / "000000.png").touch()
    neighbour = JobFolder.create(job.path.parent, "abc-456", REQUEST)
    job.delete()
    assert not job.path.exists()
    assert neighbour.request() == REQUEST
    job.delete()  # gone already


def test_delete_does_not_follow_links(job: JobFolder, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "request.json").touch()
    link = JobFolder(job.path.parent / "abc-789")
    link.path.symlink_to(kept)
    with pytest.raises(OutputError, match="cannot be deleted"):
        link.delete()
    (job.path / "inner").symlink_to(kept)
    job.delete()
    assert (kept / "request.json").exists()


def test_outputs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALPARAL_OUTPUTS", raising=False)
    assert outputs_folder() == tmp_path / "outputs"
    monkeypatch.setenv("DUALPARAL_OUTPUTS", "elsewhere")
    assert outputs_folder() == tmp_path / "elsewhere"
    assert outputs_folder("named") == tmp_path / "named"
    assert outputs_folder("~/x").is_relative_to(Path.home())


def test_write_atomically_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="large"):
            write_atomically(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
