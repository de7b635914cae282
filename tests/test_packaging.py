"""The wheel holds every package, the presets and what the page needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "dualparal").rglob("__init__.py")}
    assert set(listed) == found | {"dualparal._presets"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tree (a build writes beside its sources)."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if (
            name.startswith(("dualparal/", "training/", "presets/", "pyproject", "requirements", "README", "LICENSE"))
            and (ROOT / name).is_file()
        ):
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "tree"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_presets_and_page(wheel: set[str]) -> None:
    for preset in (ROOT / "presets").glob("*.toml"):
        assert f"dualparal/_presets/{preset.name}" in wheel
    for file in (ROOT / "dualparal" / "ui").iterdir():
        if file.is_file() and file.suffix not in (".py", ".pyi"):
            assert f"dualparal/ui/{file.name}" in wheel
    assert "dualparal/engine/engine.py" in wheel
    assert {"dualparal/model/latent_rgb_wan2.1.json", "dualparal/pocket/weights/latent_rgb.json"} <= wheel
    assert not any(name.startswith(("training/", "tests/", "benchmarks/")) for name in wheel)


def test_the_wheel_holds_the_embedded_model(wheel: set[str]) -> None:
    weights = ROOT / "dualparal" / "pocket" / "weights"
    if not weights.is_dir():
        pytest.skip("this tree holds no trained pocket weights")
    for file in weights.rglob("*"):
        if file.is_file():
            assert str(file.relative_to(ROOT)) in wheel
    assert "dualparal/pocket/loras/pocket-fast.safetensors" in wheel


def test_the_wheel_holds_licences_and_the_command(wheel: set[str]) -> None:
    (info,) = {name.split("/")[0] for name in wheel if ".dist-info/" in name}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", "dualparal/pocket/README.md"} <= wheel
