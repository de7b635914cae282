"""A Space: what would be pushed, what is refused before it is, and what `app.py` opens on a machine it does not know."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from dualparal.planning.choose import Setup, choose_setup, download_bytes
from dualparal.planning.placement import ModelSizes
from dualparal.presets import load_presets
from dualparal.ui import serve

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


@pytest.fixture
def space_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import push_space

    yield push_space
    sys.modules.pop("push_space")


def test_a_dry_run_sends_nothing(
    space_script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(space_script, "push", lambda space: pytest.fail("a dry run pushed"))
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    flags = ["--repo", "me/studio", "--dry-run", "--hardware", "l4x4", "--secret", "HF_TOKEN", "--volume", "me/data"]
    assert space_script.main([*flags, "--variable", "A=b=c"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "me/studio (gradio, public)",
        "l4x4",
        "HF_HOME=/data/huggingface",
        "A=b=c",
        "secret HF_TOKEN",
        "nothing was pushed",
    ):
        assert part in printed
    assert "hf_verysecret" not in printed


def test_what_a_space_holds(space_script: Any, tmp_path: Path) -> None:
    space = space_script.describe(space_script.parser().parse_args(["--repo", "me/studio", "--sdk", "docker"]))
    space_script.check(space)
    space_script.stage(space, tmp_path)
    for name in ("app.py", "Dockerfile", "requirements.txt", "presets/wan2.1-1.3b-480p.toml", "dualparal/ui/style.css"):
        assert (tmp_path / name).is_file()
    assert not (tmp_path / "tests").exists() and not (tmp_path / "benchmarks").exists()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    values = space_script.read_front_matter(text)
    assert values["sdk"] == "docker" and values["app_port"] == 7860 and "app_file" not in values
    assert text.count("\n---\n") == 1 and "# DualParal Studio" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--repo", "studio"], "OWNER/NAME"),
        (["--repo", "me/studio", "--variable", "A"], "NAME=VALUE"),
        (["--repo", "me/studio", "--secret", "NO_SUCH_SECRET"], "NO_SUCH_SECRET is not set"),
    ],
)
def test_bad_flags(space_script: Any, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert space_script.main([*flags, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colorFrom": "mauve"}, "colorFrom"), ({"suggested_hardware": "l4x3"}, "suggested_hardware"),
        ({"emojy": "x"}, "emojy"),
        ({"startup_duration_timeout": "soon"}, "startup_duration_timeout"), ({"title": ""}, "title"),
        ({"app_file": "main.py"}, "main.py is not tracked"), ({"short_description": "x" * 61}, "60 characters"),
    ],
)  # fmt: skip
def test_front_matter_is_checked(space_script: Any, changes: dict[str, str], says: str) -> None:
    space = space_script.describe(space_script.parser().parse_args(["--repo", "me/studio"]))
    with pytest.raises(ValueError, match=says):
        space_script.check(dataclasses.replace(space, front_matter={**space.front_matter, **changes}))


def test_a_tree_that_is_too_large(space_script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_script, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="MB"):
        space_script.check(space_script.describe(space_script.parser().parse_args(["--repo", "me/studio"])))


# What opens without flags


@pytest.mark.parametrize(
    ("num_gpus", "gigabytes", "name", "ranks"),
    [
        (0, None, None, 1),  # CPU hardware
        (1, None, None, 1),  # no nvidia-smi
        (1, 16, None, 1),  # T4
        (1, 24, "wan2.1-1.3b-480p", 1),  # l4x1: the text encoder waits in host memory
        (1, 48, "wan2.1-1.3b-480p", 1),  # L40S
        (4, 24, "wan2.1-1.3b-480p", 4),  # l4x4
        (2, 18, "wan2.1-1.3b-480p", 1),  # the codec wants a card of its own
        (4, 48, "wan2.1-14b-480p", 4),  # l40sx4
        (8, 80, "wan2.1-14b-480p", 8),  # a100x8
        (16, 80, "wan2.1-14b-480p", 8),  # a longer pipeline does not pay
    ],
)
def test_the_setup_for_a_machine(num_gpus: int, gigabytes: int | None, name: str | None, ranks: int) -> None:
    per_gpu = gigabytes and gigabytes * GB
    setup = choose_setup(load_presets(), num_gpus=num_gpus, bytes_per_gpu=per_gpu, free_bytes=1000 * GB)
    assert ((setup.preset and setup.preset.name), setup.ranks) == (name, ranks), setup.reason


def test_the_disk_counts_too() -> None:
    """A Space has 50 GB of its own; the 14B model wants a volume."""
    presets = load_presets()
    small = choose_setup(presets, num_gpus=4, bytes_per_gpu=48 * GB, free_bytes=50 * GB)
    assert small.preset is not None and small.preset.name == "wan2.1-1.3b-480p"
    none = choose_setup(presets, num_gpus=4, bytes_per_gpu=48 * GB, free_bytes=5 * GB)
    assert none.preset is None and "of disk" in none.reason
    there = choose_setup(presets, num_gpus=4, bytes_per_gpu=48 * GB, free_bytes=5 * GB, has_model=True)
    assert there.preset is not None and there.preset.name == "wan2.1-14b-480p"
    sizes = ModelSizes.published("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert sizes is not None and 70 * GB < download_bytes(sizes) < 90 * GB


def test_flags_win_over_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Setup(preset=load_presets()["wan2.1-1.3b-480p"], ranks=4, reason="test")
    monkeypatch.setattr(serve, "choose_for_this_host", lambda presets: chosen)
    monkeypatch.setattr(serve, "default_model", lambda: ("embedded", None))

    def opened(*flags: str, may_choose: bool = True) -> tuple[Any, Any, int]:
        arguments: argparse.Namespace = serve.parser().parse_args(flags)
        return serve.unasked(arguments, arguments.ranks or 1, may_choose=may_choose)

    assert opened() == ("wan2.1-1.3b-480p", chosen.preset, 4)
    assert opened("--device", "cpu") == ("embedded", None, 1)
    assert opened("--ranks", "2") == ("embedded", None, 2)
    assert opened(may_choose=False) == ("embedded", None, 1), "under torchrun the number of ranks is given"
