"""The Dockerfile as its lines say it (scripts/dockerfile_in_chroot.py runs them), and what of this tree goes into the image."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import dockerfile_in_chroot

    yield dockerfile_in_chroot
    sys.modules.pop("dockerfile_in_chroot")


def steps(script: Any, **arguments: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = script.steps((ROOT / "Dockerfile").read_text(encoding="utf-8"), arguments)
    return found


def environment(lines: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for word, rest in lines if word == "ENV" for pair in shlex.split(rest))


def test_variants_differ_in_the_base_only(script: Any) -> None:
    cuda, cpu = steps(script), steps(script, VARIANT="cpu")
    assert [word for word, _ in cuda[:2]] == ["ENV", "RUN"] and "apt-get" in cuda[1][1]
    assert cpu[0] == ("ENV", "TORCH_INDEX=https://download.pytorch.org/whl/cpu")
    assert cuda[2:] == cpu[1:]


def test_what_the_image_promises(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = steps(script)
    last = dict(lines)
    assert (last["USER"], last["EXPOSE"], last["VOLUME"]) == ("1000", "7860", "/data")
    assert environment(lines)["GRADIO_SERVER_PORT"] == "7860"
    assert "http://127.0.0.1:7860/readyz" in json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[-1]
    import push_space

    kept = {name: value for name, value in environment(lines).items() if value.startswith("/data/")}
    assert kept == push_space.DATA_VARIABLES, "an image and a Space keep the same things in the volume"
    assert {"HF_HOME", "DUALPARAL_OUTPUTS", "DUALPARAL_CACHE"} <= set(kept)
    sys.modules.pop("push_space")


def test_the_image_holds_the_program_and_no_more(script: Any) -> None:
    names = set(script.context(ROOT, (ROOT / ".dockerignore").read_text(encoding="utf-8")))
    for name in ("app.py", "requirements.txt", "presets/pocket.toml", "dualparal/ui/style.css", "examples/save_video.py"):
        assert name in names
    assert "dualparal/pocket/weights/vae/diffusion_pytorch_model.safetensors" in names
    left_out = (".git", "tests", "benchmarks", "docs/images", ".venv", "outputs")
    assert not [name for name in names if name.startswith(tuple(f"{folder}/" for folder in left_out)) or name in left_out]


def test_dockerignore_patterns(script: Any, tmp_path: Path) -> None:
    for name in ("a.log", "b/a.log", "b/c/__pycache__/x", ".x_cache/y", "b/keep", "logs/z", "b/logs/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = set(script.context(tmp_path, "# comment\n*.log\n.*_cache\nlogs\n**/__pycache__\n"))
    assert names == {"b", "b/a.log", "b/c", "b/keep", "b/logs", "b/logs/z"}
    assert "a.log" in set(script.context(tmp_path, ""))


def test_lines_that_are_continued(script: Any) -> None:
    text = 'ARG V=a\nFROM x:1 AS base-a\nENV A=1\nFROM base-${V}\nRUN one \\\n    # why\n    && two\nCMD ["x"]\n'
    assert script.steps(text, {}) == [("ENV", "A=1"), ("RUN", "one && two"), ("CMD", '["x"]')]
    with pytest.raises(SystemExit, match="ONBUILD is not known"):
        script.Container(Path("/nowhere"), {}).do("ONBUILD", "RUN x")
