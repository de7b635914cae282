"""A disk that is really full: a small file system of memory, filled to its last byte while jobs are under way."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dualparal.engine.engine import Engine
from dualparal.errors import OutputError
from dualparal.events import Failed, Finished
from dualparal.jobs.claim import is_claimed
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.media.writer import VideoWriter, remove_partials
from dualparal.request import GenerationRequest
from dualparal.ring.saved_sweeps import StateWriter, read_state
from tests.fake_group import FOUR_BLOCKS, GroupLog, fake_groups

SIZE_MB = 4
SECONDS = 20.0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """The root of a file system of a few megabytes."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(root)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.decode().strip()}")
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.fixture
def group_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupLog]:
    monkeypatch.setattr("dualparal.planning.disk.RESERVE_BYTES", 2**18)
    with fake_groups(monkeypatch) as found:
        yield found


@pytest.fixture
def engine(tiny: Path, small: Path, group_log: GroupLog) -> Iterator[Engine]:
    with Engine(tiny, device="cpu", threads=1, outputs=small / "outputs") as made:
        yield made
        group_log.let_go.set()


def fill(root: Path) -> Path:
    """Take every byte that is left; returns the file to delete."""
    file = root / "filler"
    with file.open("wb", buffering=0) as opened:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    opened.write(b"x" * size)
            except OSError:
                continue
    assert shutil.disk_usage(root).free == 0
    return file


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def wants(prompt: str) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, **FOUR_BLOCKS)


def ends(folder: JobFolder) -> list[type]:
    return [type(event) for event in folder.events() if isinstance(event, (Finished, Failed))]


def test_a_job_that_ends_on_a_full_disk_is_told_to_it_later(engine: Engine, small: Path, group_log: GroupLog) -> None:
    job = engine.submit(wants("slow and die"))
    until(lambda: len(job.view().blocks) == 2)
    filler = fill(small)
    # The journal's last page has room for a little: take that too, as other events would.
    with (job.folder.path / "events.jsonl").open("ab", buffering=0) as lines:
        lines.write(b" " * (-lines.tell() % os.sysconf("SC_PAGE_SIZE")))
    group_log.groups[-1].kill()
    until(lambda: job.has_ended)
    assert job.state == "failed" and ends(job.folder) == []
    assert is_claimed(job.folder), "somebody could take it for a job that was cut off"
    filler.unlink()
    until(lambda: ends(job.folder) == [Failed] and not is_claimed(job.folder))
    assert engine.submit(wants("next")).result(SECONDS)


def test_half_a_line_is_taken_back(small: Path) -> None:
    folder = JobFolder.create(small / "outputs", "abcdef", wants("x"))
    journal, page = folder.path / "events.jsonl", os.sysconf("SC_PAGE_SIZE")
    event = Failed(job_id="abcdef", kind="OutputError", message="full")
    folder.append(event)
    whole = journal.stat().st_size
    filler = fill(small)
    with journal.open("ab", buffering=0) as lines:
        lines.write(b" " * (page - 2 * whole) + b"\n")  # the next line fits but for its last two bytes
    with pytest.raises(OutputError, match="free space"):
        folder.append(event)
    assert journal.stat().st_size == page - whole + 1
    filler.unlink()
    folder.append(event)
    assert folder.events() == [event, event]


def test_an_engine_closed_on_a_full_disk_lets_its_jobs_go(engine: Engine, small: Path, group_log: GroupLog) -> None:
    job = engine.submit(wants("slow and die"))
    until(lambda: len(job.view().blocks) == 2)
    filler = fill(small)
    with (job.folder.path / "events.jsonl").open("ab", buffering=0) as lines:
        lines.write(b" " * (-lines.tell() % os.sysconf("SC_PAGE_SIZE")))
    group_log.groups[-1].kill()
    until(lambda: job.has_ended)
    engine.close()
    assert not is_claimed(job.folder) and ends(job.folder) == []
    filler.unlink()


def test_nothing_is_queued_on_a_full_disk(engine: Engine, small: Path) -> None:
    engine.submit(wants("first")).result(SECONDS)
    filler = fill(small)
    with pytest.raises(OutputError, match="0 MB free"):
        engine.submit(wants("second"))
    assert len(list(list_jobs(engine.outputs))) == len(list(engine.outputs.iterdir())) == 1
    filler.unlink()
    assert engine.submit(wants("third")).result(SECONDS)


def test_a_folder_that_cannot_be_made_whole_is_not_made(small: Path) -> None:
    (small / "outputs").mkdir()
    fill(small)
    with pytest.raises(OutputError, match="results cannot be written"):
        JobFolder.create(small / "outputs", "abcdef", wants("x"))
    assert list((small / "outputs").iterdir()) == []


def test_videos_on_a_full_disk(small: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
    writer = VideoWriter(small / "job", width=64, height=64, fps=16)
    first = writer.add_block(noise)
    filler = fill(small)
    with pytest.raises(OutputError, match="free space"):
        writer.add_block(noise)
    with pytest.raises(OutputError, match="space"):
        writer.finish("{}")
    assert [path.name for path in (small / "job").iterdir()] == [first.path.name]
    filler.unlink()
    writer.add_block(noise)
    assert writer.finish("{}") and writer.num_frames == 18


def test_saved_sweeps_on_a_full_disk(small: Path) -> None:
    fill(small)
    writer = StateWriter(small / "state")
    writer.save_block(0, torch.zeros(2**16))
    writer.close()
    assert not writer.wants_sweep()
    state, finished = read_state(small / "state")
    assert state is None and not len(finished)


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    left = [".video.mp4.part", ".video.1a2b.mp4.part", ".block_0003.ts.part", "state/.sweep.safetensors.part"]
    kept = ["video.mp4", "block_0001.ts", ".request.json.part", ".timeline.json.part", "state/sweep.safetensors", "x.part"]
    for name in [*left, *kept]:
        (tmp_path / name).touch()
    remove_partials(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
