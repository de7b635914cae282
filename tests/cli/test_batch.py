"""`generate --batch`: checked as a whole, made one by one over fake workers, gone on with, told about; what its page says."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.cli.batch_lines import KEY_CHARS, _together
from dualparal.cli.main import main
from dualparal.jobs.folder import list_jobs
from dualparal.media.metadata import describe, read_settings
from tests.conftest import wait_until
from tests.fake_group import FOUR_BLOCKS, NUM_FRAMES, GroupLog

SMALL = [word for name, value in FOUR_BLOCKS.items() for word in (f"--{name}", str(value))]


class Command:
    """`generate --batch` with the tiny model."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._model, self._capsys = folder, model, capsys
        self.out = self.err = ""

    def __call__(self, lines: str, *flags: str, name: str = "films.jsonl") -> int:
        file = self.folder / name
        file.write_text(lines, encoding="utf-8")
        where = ["--model_id", str(self._model), "--outputs", str(self.folder / "outputs"), "--device", "cpu", "--threads", "1"]
        code = main(["generate", "--batch", str(file), *where, *SMALL, *flags])
        self.out, self.err = self._capsys.readouterr()
        return code

    def jobs(self) -> list[str]:
        return sorted(folder.job_id for folder in list_jobs(self.folder / "outputs"))


@pytest.fixture
def batch(tmp_path: Path, tiny: Path, group_log: GroupLog, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, tiny, capsys)


def films(*lines: Any) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_video_for_each_line_and_then_none(batch: Command, group_log: GroupLog) -> None:
    lines = films({"prompt": "a kite", "seed": 3}, "a boat", {"prompt": "two boats", "latents_num": 2, "save_file": "two.mp4"})
    target = batch.folder / "films"
    assert batch(lines, "--save_file", str(target)) == 0
    assert sorted(path.name for path in target.iterdir()) == ["0001.mp4", "0002.mp4", "two.mp4"]
    assert [describe(target / f"{name}.mp4")["num_frames"] for name in ("0001", "0002", "two")] == [NUM_FRAMES, NUM_FRAMES, 5]
    assert read_settings(target / "0001.mp4").seed == 3
    assert batch.out.endswith("3 videos: 3 made\n") and "line 2: " in batch.out
    assert group_log.names() == ["a kite", "a boat", "two boats"]

    (target / "0002.mp4").unlink()
    assert batch(lines, "--save_file", str(target)) == 0
    assert batch.out.endswith("3 videos: 3 there already\n") and len(group_log.runs) == 3
    assert (target / "0002.mp4").is_file()


def test_a_text_file_has_a_prompt_a_line(batch: Command, group_log: GroupLog) -> None:
    assert batch("﻿a kite\n\n  a boat \r\n", name="prompts.txt") == 0
    assert group_log.names() == ["a kite", "a boat"] and len(batch.jobs()) == 2


def test_what_is_added_or_moved_is_no_other_video(batch: Command, group_log: GroupLog) -> None:
    assert batch(films("a kite", "a kite")) == 0
    assert batch(films("a boat", "a kite", "a kite", "a kite")) == 0
    assert batch.out.endswith("4 videos: 2 made, 2 there already\n")
    assert sorted(group_log.names()) == ["a boat", "a kite", "a kite", "a kite"]
    assert batch(films("a kite"), "--sample_steps", "3") == 0
    assert batch.out.endswith("1 videos: 1 made\n"), "other settings are another video"


def test_all_lines_are_checked_before_the_first_is_begun(batch: Command, group_log: GroupLog) -> None:
    lines = films("a kite", {"prompt": "x", "height": 33}, {"promt": "x"}, 7, {"prompt": "x", "save_file": 1}, {"prompt": " "},
                  {"prompt": "x", "takes": 2}, {"prompt": "x", "continue_from": "abcdef"},
                  {"prompt": "x", "is_endless": True})  # fmt: skip
    assert batch(lines + '{"prompt": \n' + "[" * 100_000) == 2
    for number in range(2, 12):
        assert f"  line {number}: " in batch.err
    assert "line 1:" not in batch.err and "10 of its lines" in batch.err and "did you mean prompt" in batch.err
    assert not group_log.groups and not (batch.folder / "outputs").exists()


def test_a_file_that_cannot_be_read(batch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "films.jsonl":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert batch(films("a kite")) == 2
    assert "films.jsonl cannot be read: Permission denied" in batch.err


@pytest.mark.parametrize(("lines", "says"), [("", "is empty"), ("\n \n", "is empty"), ("\udcff", "UTF-8")])
def test_a_file_that_holds_nothing(batch: Command, lines: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(lines.encode(errors="surrogateescape"))
    assert main(["generate", "--batch", str(tmp_path / "x.txt"), "--outputs", str(tmp_path / "outputs")]) == 2
    assert says in batch._capsys.readouterr().err


def test_names_that_do_not_fit(batch: Command, tmp_path: Path) -> None:
    one = {"prompt": "a kite", "save_file": "x.mp4"}
    assert batch(films(one, one), "--save_file", str(tmp_path / "films")) == 2 and "of line 1 too" in batch.err
    (tmp_path / "file").touch()
    assert batch(films("a kite"), "--save_file", str(tmp_path / "file")) == 2 and "is a file" in batch.err
    for flag in ("--job_id=abcdef", "--look=x.webp", "--prompt=x", "--baseline=wan"):
        assert batch(films("a kite"), flag) == 2 and "is of one video" in batch.err
    assert main(["generate", "--batch", str(tmp_path / "none.jsonl")]) == 2


def test_one_that_fails_costs_no_other_and_goes_on_the_next_time(batch: Command, group_log: GroupLog) -> None:
    lines = films("a kite that is to fail", "a boat", "let it die once")
    assert batch(lines) == 1
    assert batch.out.endswith("3 videos: 1 made, 2 failed\n")
    assert "line 1: rank 0 ran out of memory" in batch.err and "line 3: " in batch.err
    before = batch.jobs()
    assert batch(lines) == 1
    assert batch.out.endswith("3 videos: 1 made, 1 there already, 1 failed\n")
    assert batch.jobs() == before and all(job_id[-KEY_CHARS - 1] == "-" for job_id in before)
    assert [run.is_resumed for run in group_log.runs[3:]] == [True, True]


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Where the tests were started in the background, as a shell's `&` does it, nobody does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_control_c_keeps_what_is_done_and_the_next_run_goes_on(batch: Command, group_log: GroupLog) -> None:
    def interrupt() -> None:
        assert wait_until(lambda: len(list(batch.folder.glob("outputs/*/block_0001.ts"))) == 2, 60)
        assert wait_until(lambda: len(batch.jobs()) == 3, 60), "the third is not in line"
        os.kill(os.getpid(), signal.SIGINT)

    lines = films("a kite", "a slow boat", "a tree", "a house")
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert batch(lines) == 130
    thread.join()
    assert "1 made" in batch.out and "2 stopped, 1 not begun" in batch.out and "finished part: " in batch.err
    before = batch.jobs()
    group_log.let_go.set()
    assert batch(lines) == 0
    assert batch.out.endswith("4 videos: 3 made, 1 there already\n")
    assert set(before) < set(batch.jobs()) and len(batch.jobs()) == 4


def test_a_lines_own_length_is_its_own() -> None:
    defaults = {"seconds": 8, "seed": 1}
    assert _together(defaults, {"prompt": "x"}) == {"seconds": 8, "seed": 1, "prompt": "x"}
    assert _together(defaults, {"prompt": "x", "num_frames": 5}) == {"seed": 1, "prompt": "x", "num_frames": 5}
    assert "seconds" not in _together(defaults, {"prompt": "a kite\n[2s] red"})
    assert _together(defaults, {"prompt": "x", "seed": None})["seed"] is None


def test_without_a_prompt_or_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate"]) == 2
    assert "prompt is missing" in capsys.readouterr().err


def test_the_lines_of_the_page(batch: Command, group_log: GroupLog) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    lines = page.partition("```json\n")[2].partition("```")[0]
    assert lines.count("\n") == 4
    where = ["--outputs", str(batch.folder / "outputs"), "--save_file", str(batch.folder), "--device", "cpu"]
    small = ["--height", "32", "--width", "32", "--sample_steps", "2"]
    assert main(["generate", "--batch", str(written(batch.folder, lines)), *where, *small]) == 0
    made = [describe(batch.folder / f"{name}.mp4")["num_frames"] for name in ("0001", "harbour", "0003")]
    assert made == [129, 130, 81] and len(group_log.runs) == 4


def written(folder: Path, lines: str) -> Path:
    (folder / "page.jsonl").write_text(lines, encoding="utf-8")
    return folder / "page.jsonl"
