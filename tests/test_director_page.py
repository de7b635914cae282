"""docs/director.md against the program: its timeline is what its table says, its Python and its command make films."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dualparal.cli.main import main
from dualparal.media.metadata import describe
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of
from dualparal.request import Settings
from tests.settings import settings
from tests.test_docs import commands

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "director.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


def rows(film: Settings, plan: BlockPlan) -> list[str]:
    found, at = [], 0
    for number, shot in enumerate(film.shots or (), 1):
        first, left = at, shot.latents_num or 0
        while left:
            left, at = left - plan.lengths[at], at + 1
        frames = sum(len(plan.frames(block)) for block in range(first, at))
        lengths = ", ".join(map(str, plan.lengths[first:at]))
        found.append(f"| {number} | {shot.latents_num} | {lengths} | {frames} |")
    return found


def test_the_table_of_the_timeline() -> None:
    film = settings(prompt=blocks("text")[0], fps=16, num_per_block=8, num_cat=8)
    reported = rows(film, plan_of(film))
    assert len(reported) == 3
    for row in reported:
        assert row in PAGE


@pytest.mark.distributed
def test_the_python_makes_films_steers_one_and_ends_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shots, steered, endless = [run(code) for code in blocks("python")]
    assert describe(shots["result"].path)["num_frames"] == shots["result"].num_frames == 57 + 17
    assert 0 < steered["told"].from_s < 20
    result = endless["job"].result()
    assert describe(result.path)["num_frames"] == result.num_frames == endless["told"].num_frames > 16


def run(code: str) -> dict[str, Any]:
    """What is named in it afterwards."""
    made: dict[str, Any] = {}
    exec(compile(code, "docs/director.md", "exec"), made)
    return made


@pytest.mark.distributed
def test_the_commands_make_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(PAGE):
        words = shlex.split(command.replace("$'", "'"))
        assert main([word.replace("\\n", "\n") for word in words[words.index("generate") :]]) == 0
    assert describe(tmp_path / "film.mp4")["num_frames"] == 33 + 25
    joined = next(path for path in (tmp_path / "outputs").glob("*/video.mp4") if (path.parent / "before.mp4").exists())
    assert describe(joined)["num_frames"] == 65 + 64
