"""Tensors on disk: a safetensors file is there whole, or as it was before, and says so itself.

Each file holds a checksum over what it is (job and name), what is said of it, and its tensors' bytes: bits that have changed, a
file cut short or one that belongs elsewhere are found out when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dualparal.errors import OutputError
from dualparal.files import replace_durably

CHECKSUM = "checksum"


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write `file` under a temporary name and rename it. Raises OSError or SafetensorError."""
    partial = file.with_name(f".{file.name}.part")
    # One tensor may be held under two names; safetensors wants each to have memory of its own.
    held = {key: x.detach().cpu().clone().contiguous() for key, x in tensors.items()}
    try:
        save_file(held, partial, {**metadata, CHECKSUM: _checksum(file, file.name, held, metadata)})
        replace_durably(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(
    file: Path, written_as: str | None = None, written_for: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) as `write_tensors` was given them. `written_as`: its name then, where it has been renamed;
    `written_for`: its job, where it was another's. Raises `OutputError` when the file is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not iterable by itself
    except FileNotFoundError:
        raise OutputError(f"{file} is missing") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # torch's own where it cannot map the file
        raise OutputError(f"{file} cannot be read ({error})") from None
    if metadata.pop(CHECKSUM, None) != _checksum(file, written_as or file.name, tensors, metadata, written_for):
        raise OutputError(f"{file} is damaged: its checksum does not fit")
    return tensors, metadata


def _checksum(
    file: Path, written_as: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], job_id: str | None = None
) -> str:
    """Of a file in a folder within a job's; that one is named after the job."""
    about = json.dumps([job_id or file.parent.parent.name, written_as, sorted(metadata.items())])
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
