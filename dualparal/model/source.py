"""From what a user calls a model (preset, folder, hub id) to a checkpoint folder on this host. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from dualparal.errors import CheckpointError
from dualparal.model.hub import download_snapshot
from dualparal.model.layout import Checkpoint
from dualparal.presets import Preset, find_preset

POCKET_WEIGHTS = Path(__file__).resolve().parent.parent / "pocket" / "weights"


def find_model(model: str, preset: Preset | None = None) -> tuple[Preset, Checkpoint]:
    """The preset and the validated checkpoint of `model`; `preset` replaces the one found by name.

    A hub id is downloaded once per host by huggingface_hub (only the files a run needs, resumed where it stopped). Raises
    `PresetError` or `CheckpointError`.
    """
    if preset is None:
        preset = find_preset(str(model))
        name = preset.model or str(model)
    else:
        name = str(model) if Path(model).is_dir() else preset.model or str(model)
    folder = _folder(name, preset.revision)
    checkpoint = Checkpoint(folder)
    checkpoint.validate()
    return preset, checkpoint


def _folder(name: str, revision: str | None) -> Path:
    if name == "pocket":
        if not POCKET_WEIGHTS.is_dir():
            raise CheckpointError("this installation holds no pocket weights; give a checkpoint folder or a hub id")
        return POCKET_WEIGHTS
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"there is no folder {name}; give a checkpoint folder in diffusers' layout or a hub id")
    return download_snapshot(name, revision)
