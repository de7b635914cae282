"""Early looks for the page: where the browser finds each block's pictures, and which step they show."""

from __future__ import annotations

from urllib.parse import quote

from dualparal.ui.snapshot import Snapshot
from dualparal.ui.words import safe


def waits(found: Snapshot) -> str:
    """What the stage says before there is anything to see."""
    if found.is_baseline:
        return "Plain Wan shows nothing before it is done"
    return "Waiting for its turn" if found.state == "queued" else "The first rough pictures come with the first steps"


def pictures(found: Snapshot, root: str) -> dict[int, str]:
    """By block, the address of its look, which changes with the look."""
    return {block: url for block, (url, _) in _looks(found, root).items()}


def cells(found: Snapshot, root: str) -> dict[int, str]:
    """By block, the attributes that tell the page's script of its look."""
    return {block: f' data-look="{safe(url)}" data-step="{step}"' for block, (url, step) in _looks(found, root).items()}


def _looks(found: Snapshot, root: str) -> dict[int, tuple[str, int]]:
    """By block, the look's address and step. Those of an earlier run are on disk only, and their steps are not known."""
    where = f"{root}gradio_api/file={quote(str(found.folder.look))}"
    on_disk = (int(path.stem) for path in found.folder.look.glob("[0-9]*.jpg") if path.stem.isdecimal())
    steps = {**dict.fromkeys(on_disk, 0), **{block: look.step for block, look in found.looks.items()}}
    return {block: (f"{where}/{block:04d}.jpg?{step}", step) for block, step in steps.items()}
