"""Tensors on disk: a safetensors file is there whole, or as it was before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from dualparal.files import replace_durably


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write `file` under a temporary name and rename it. Raises OSError or SafetensorError."""
    partial = file.with_name(f".{file.name}.part")
    try:
        # One tensor may be held under two names; safetensors wants each to have memory of its own.
        save_file({key: x.detach().cpu().clone().contiguous() for key, x in tensors.items()}, partial, metadata)
        replace_durably(partial, file)
    finally:
        partial.unlink(missing_ok=True)
