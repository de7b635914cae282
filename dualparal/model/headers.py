"""What a safetensors file says of itself: names, types and shapes of its tensors, without reading a weight.

Follows the safetensors format: 8 bytes little-endian header length, JSON header, data. Needs no torch.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and its name there: `dtype` as safetensors spells it (F32, BF16, ...).

    What is stored is to be multiplied by `scale` where there is one, each number of which is for a `block` of rows and columns.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    scale: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors a safetensors file lists; raises `CheckpointError` when it is missing, cut off or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file} is not a whole safetensors file ({size} bytes); download it again")
            header = json.loads(opened.read(length))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in entries.values()), default=0)
        found = {key: TensorInfo(file, key, value["dtype"], tuple(value["shape"])) for key, value in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; the download is incomplete") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} has a damaged safetensors header; download it again") from None
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is cut off: {size} bytes of {8 + length + end}; download it again")
    return found


def read_headers(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """Every tensor of the safetensors files `stem` in `folder`: of the shards that an index lists where there is one (a single
    file beside it is left from before), else of the single file. Checks that no file is cut off. Raises `CheckpointError`."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if single.is_file():
            return read_header(single)
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} holds pickled weights (.bin); only safetensors are read, convert it first")
        raise CheckpointError(f"{folder} has no {single.name} and no {index.name}; the download is incomplete")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        found |= read_header(folder / name)
    if lost := sorted(set(weight_map) - set(found)):
        raise CheckpointError(f"{index} lists {lost[0]} (and {len(lost) - 1} more) that its files do not hold")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file cannot be read or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; is this a Wan checkpoint in diffusers' layout?"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; download it again")
    return found
