"""What files are, cheaply: so that a job, or an embedding that was kept, is known to be of other weights than those here now.

Small files are read; of large ones size, time and, in the hub's cache, the content's own hash are taken. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_source import Lora

READ_WHOLE_BYTES = 16 * 2**20


def fingerprint(*folders: Path) -> str:
    """Changes when a file in `folders` does. Raises OSError."""
    return _of_files(file for folder in folders for file in sorted(folder.iterdir()) if file.is_file())


def fingerprints(checkpoint: Checkpoint, loras: Sequence[Lora] = ()) -> dict[str, str]:
    """A fingerprint of each part of the checkpoint and of each LoRA, by name. Raises `CheckpointError`."""
    try:
        return {part: fingerprint(checkpoint.folder / part) for part in checkpoint.parts} | of_loras(loras)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}; the download is incomplete") from None


def of_loras(loras: Sequence[Lora]) -> dict[str, str]:
    """A fingerprint of each LoRA, by name. Raises OSError."""
    return {f"LoRA {lora.name}": _of_files([Path(lora.file)]) for lora in loras}


def _of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat, target = file.stat(), file.resolve()
        digest.update(f"{file.parent.name}/{file.name} {stat.st_size}\n".encode(errors="surrogateescape"))
        if target.parent.name == "blobs":
            digest.update(target.name.encode())
        elif stat.st_size <= READ_WHOLE_BYTES:
            digest.update(file.read_bytes())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]
