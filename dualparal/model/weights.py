"""Reads the weights of a part, tensor by tensor, and loads the two parts that one process holds whole: VAE and text encoder.

What each tensor is called and where it lies is `layout`'s business. What does not fit the module after all is named by the
worker that loads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from torch import nn

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo
from dualparal.model.layout import Checkpoint
from dualparal.model.parts import PARTS
from dualparal.model.validation import check_shape

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel


def read_tensors(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) file by file, in the order of the file; at most one tensor is in flight, besides the scales.

    What has a scale comes multiplied by it, in float32. Raises `CheckpointError`.
    """
    infos = {name: info.scale for name, info in tensors.items() if info.scale}
    scales = dict(read_tensors(infos)) if infos else {}
    names = {(info.file, info.key): name for name, info in tensors.items()}
    for file in sorted({info.file for info in tensors.values()}):
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:
                raise CheckpointError(f"{file} cannot be opened as safetensors: {error}") from None
            for key in opened.keys():  # noqa: SIM118 - not iterable by itself
                if name := names.get((file, key)):
                    value = opened.get_tensor(key)
                    yield name, scaled(value, scales.pop(name), tensors[name]) if name in scales else value


def scaled(value: torch.Tensor, scale: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """`value` as it was before it was stored as `info` says: float32, each block multiplied by its number of `scale`.

    Raises `CheckpointError` when a scale is not a number.
    """
    assert info.scale is not None
    scale = scale.float()
    if not torch.isfinite(scale).all():
        raise CheckpointError(f"{info.scale.file}: {info.scale.key} holds NaN or infinite numbers; download it again")
    whole = value.to(torch.float32, copy=True)
    matrix = whole.view(len(value) if value.ndim else 1, -1)
    rows, columns = (min(of, size) for of, size in zip(info.block, matrix.shape, strict=True))
    numbers = scale.reshape(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    if matrix.shape[1] % columns == 0:
        for stripe, row in zip(matrix.split(rows), numbers, strict=True) if rows > 1 else ((matrix, numbers),):
            stripe.view(len(stripe), -1, columns).mul_(row.unsqueeze(-1))
    else:
        for stripe, row in zip(matrix.split(rows), numbers, strict=True):
            stripe.mul_(row.repeat_interleave(columns)[: matrix.shape[1]])
    return whole


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> AutoencoderKLWan:
    """The VAE, every tensor in `dtype`, on the CPU. Raises `CheckpointError`."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(checkpoint.config("vae"))
    _fill(vae, checkpoint, "vae", dtype)
    return vae


def load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> UMT5EncoderModel:
    """The text encoder in `dtype`, on the CPU; in float16 upstream keeps the modules of `_keep_in_fp32_modules` in float32.
    Raises `CheckpointError`."""
    from transformers import UMT5Config, UMT5EncoderModel  # takes seconds, and a prompt from the cache needs neither

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**checkpoint.config("text_encoder")))
    in_float32 = frozenset(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else frozenset()
    _fill(model, checkpoint, "text_encoder", dtype, in_float32)
    model.tie_weights()
    return model


def _fill(
    model: nn.Module, checkpoint: Checkpoint, part: str, dtype: torch.dtype, in_float32: frozenset[str] = frozenset()
) -> None:
    """Put the tensors of `part` into `model`, which was made on the meta device."""
    tensors, where = checkpoint.tensors(part), checkpoint.folder / part
    expected = {key: value for key, value in model.state_dict().items() if key not in PARTS[part].aliases}
    for what, keys in (("lacks", set(expected) - set(tensors)), ("holds the unknown", set(tensors) - set(expected))):
        if keys:
            raise CheckpointError(f"{where} {what} {min(keys)} (and {len(keys) - 1} more tensors); download it again")
    for key, value in expected.items():
        check_shape(key, tensors[key], tuple(value.shape))
    loaded = {
        key: value.to(dtype if in_float32.isdisjoint(key.split(".")) else torch.float32, copy=True)
        for key, value in read_tensors(tensors)
    }
    model.load_state_dict(loaded, strict=False, assign=True)
    model.requires_grad_(False).eval()
