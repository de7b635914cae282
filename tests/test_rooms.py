"""The house: imports point down DESIGN's list of rooms, never up, never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dualparal"
# From the roof down. What stands on one line may be imported by all lines above it, and by its own room.
ROOMS = (
    "ui", "bench", "pipeline", "cli", "engine", "hosts", "jobs", "ring", "messages", "model", "media", "planning", "presets",
    "method", "options", "request", "agreement", "prompts", "events", "devices", "gpus", "limits", "paths", "errors", "files",
    "logs", "network", "locks", "streams", "pocket",
)  # fmt: skip
DOORS = ("__init__", "__main__")  # lead into every room
STILL_UPWARD: set[tuple[str, str]] = set()

IN_CIRCLES: set[str] = set()


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dualparal":
            modules = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if _file(name) else node.module for name in modules}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("dualparal.")}
    return found - {"dualparal"}


def _file(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_every_file_stands_in_a_room() -> None:
    tops = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert {name.removesuffix(".py") for name in tops} == {*ROOMS, *DOORS}


def test_imports_point_down() -> None:
    upward = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        own = name.split("/")[0].removesuffix(".py")
        if own in DOORS:
            continue
        for module in imports_of(path):
            if ROOMS.index(module.split(".")[1]) < ROOMS.index(own):
                upward.add((name, module))
    assert upward == STILL_UPWARD, "imports point down the list of rooms: what is needed below lives below"


def test_no_file_is_in_a_circle() -> None:
    needs = {path: {_file(module) for module in imports_of(path)} - {None, path} for path in PACKAGE.rglob("*.py")}
    reached: dict[Path, set[Path]] = {}
    for path in needs:
        to_visit, reached[path] = list(needs[path]), set()
        while to_visit:
            if (near := to_visit.pop()) not in reached[path]:
                reached[path].add(near)
                to_visit += needs[near]
    circle = {path.relative_to(PACKAGE).as_posix() for path, found in reached.items() if path in found}
    assert circle == IN_CIRCLES, "these files import each other"
