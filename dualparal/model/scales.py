"""Weights stored in 8 bits beside the numbers that they are to be multiplied by: which scale belongs to which tensor.

The names are those of ComfyUI's files and their makers (`scale_weight`, `scaled_fp8`, `comfy_quant`), of compressed-tensors and
LightX2V (`weight_scale`) and of DeepSeek (`weight_scale_inv`, by blocks; it multiplies, whatever its name says). No torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from safetensors import safe_open

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo

log = logging.getLogger(__name__)
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")  # of the `.weight` beside it
INPUT_SCALES = (".scale_input", ".input_scale")  # of activations, which are not quantised here
MARKERS = ("scaled_fp8", "spiece_model")  # say what the file is, and a tokenizer within it
FORMAT = ".comfy_quant"  # JSON of one layer
FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}
SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E8M0"})
BLOCK = (128, 128)


def pair_scales(tensors: dict[str, TensorInfo], block: Sequence[int] = BLOCK) -> dict[str, TensorInfo]:
    """`tensors` of a part or a LoRA by name, each weight with its scale, and without scales and markers.

    `block` is the (rows, columns) that one number of a block-wise scale is for. Raises `CheckpointError` for a scale of a
    wrong shape or type, or without its weight.
    """
    found, scales = dict(tensors), dict[str, TensorInfo]()
    for key in tensors:
        if key.rpartition(".")[2] in MARKERS or key.endswith(INPUT_SCALES):
            log.debug("%s: %s concerns no weight and is left out", tensors[key].file, key)
            del found[key]
        elif key.endswith(FORMAT):
            _check_format(found.pop(key))
        elif end := next((end for end in SCALES if key.endswith(end)), None):
            info = found.pop(key)
            base = key.removesuffix(end)
            weight = f"{base}.weight" if f"{base}.weight" in tensors else base  # some LoRAs' matrices have no `.weight`
            if weight not in tensors:
                raise CheckpointError(f"{info.file}: {key} is the scale of a weight that is not there; download it again")
            if weight in scales:
                raise CheckpointError(f"{info.file}: {key} and {scales[weight].key} are scales of one weight; use one of them")
            scales[weight] = info
    for weight, scale in scales.items():
        found[weight] = replace(found[weight], scale=scale, block=_block(found[weight], scale, block))
    return found


def _block(weight: TensorInfo, scale: TensorInfo, block: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the weight, taken as a matrix of its outputs, that one number of its scale is for."""
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {scale.key} is stored as {scale.dtype}; a scale is one of {', '.join(sorted(SCALE_DTYPES))}"
        )
    rows = weight.shape[0] if weight.shape else 1
    columns = math.prod(weight.shape[1:])
    given = scale.shape
    while given and given[-1] == 1:
        given = given[:-1]
    if given == ():
        return rows, columns
    if given == (rows,):
        return 1, columns
    if len(weight.shape) == 2:
        per_row = (*given, 1, 1)[:2]
        if per_row == tuple(math.ceil(size / of) for size, of in zip(weight.shape, block, strict=True)):
            return block[0], block[1]
        if per_row[0] == rows and columns % per_row[1] == 0:
            return 1, columns // per_row[1]
    raise CheckpointError(
        f"{scale.file}: {scale.key} has the shape {list(scale.shape)}, which is no scale of {weight.key} with "
        f"{list(weight.shape)}: not one number, one for each output, or one for each {block[0]} x {block[1]} block"
    )


def _check_format(info: TensorInfo) -> None:
    """Raise `CheckpointError` unless the layer is only scaled: there are formats that rotate or pack it besides."""
    with safe_open(info.file, framework="np") as opened:
        said = bytes(opened.get_tensor(info.key))
    try:
        values = json.loads(said)
        is_plain = values["format"] in FORMATS and set(values) <= {"format", "full_precision_matrix_mult"}
    except (ValueError, KeyError, TypeError):
        is_plain = False
    if not is_plain:
        raise CheckpointError(
            f"{info.file}: {info.key} says {said[:99]!r}; only {', '.join(sorted(FORMATS))} are read, use another file"
        )
