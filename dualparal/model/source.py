"""From the name of weights (hub id, folder, "pocket") to a checkpoint folder on this host. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from dualparal.errors import CheckpointError
from dualparal.model.hub import download_snapshot
from dualparal.model.layout import Checkpoint
from dualparal.model.validation import validate
from dualparal.paths import expand, is_folder, why_missing

POCKET_WEIGHTS = Path(__file__).resolve().parent.parent / "pocket" / "weights"


def find_checkpoint(weights: str, revision: str | None = None) -> Checkpoint:
    """The validated checkpoint that `presets.weights_of` names.

    A hub id is downloaded once per host by huggingface_hub (only the files a run needs, resumed where it stopped). Raises
    `CheckpointError`.
    """
    checkpoint = Checkpoint(_folder(weights, revision))
    validate(checkpoint)
    return checkpoint


def _folder(name: str, revision: str | None) -> Path:
    if name == "pocket":
        if not POCKET_WEIGHTS.is_dir():
            raise CheckpointError("this installation holds no pocket weights; give a checkpoint folder or a hub id")
        return POCKET_WEIGHTS
    path = expand(name)
    if is_folder(path):
        return path
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"there is no folder {name}{why_missing(path)}; give a checkpoint folder in diffusers' layout or a hub id"
        )
    return download_snapshot(name, revision)
