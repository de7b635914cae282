"""Options that make a stage's layers smaller on its device: 8-bit weights (other bits), or layers that wait in host memory.

fp8 is diffusers' layerwise casting: linear layers of the blocks are stored as float8 e4m3 and cast up while they run, the same
modules and numbers as `WanTransformer3DModel.enable_layerwise_casting`. int8 is torchao's weight-only quantisation of the same
weights, with one scale per output. Norms, modulations, embeddings, the output head and all activations stay as they are.
Offload is diffusers' group offloading with one layer per group, prefetched on a stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

from dualparal.model.feature_cache import SelfAttention, Surroundings, TextKey

FP8 = torch.float8_e4m3fn


def quantized_linears(model: WanTransformer3DModel) -> dict[str, nn.Linear]:
    """The modules by name whose weights are stored in 8 bits: every linear layer of the blocks."""
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and isinstance(m, nn.Linear)}


class Quantizer:
    """Stores one tensor after another of a model as `quantization` wants it, while the model is being loaded."""

    def __init__(self, model: WanTransformer3DModel, quantization: str | None, dtype: torch.dtype) -> None:
        self._model, self._kind, self._dtype = model, quantization, dtype
        self._linears = quantized_linears(model) if quantization else {}

    def storage_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """What the parameter `key`, which runs in `dtype`, is stored in."""
        return FP8 if self._kind == "fp8" and key.rpartition(".")[0] in self._linears else dtype

    def after(self, key: str) -> None:
        """The parameter `key` has been set."""
        module, _, end = key.rpartition(".")
        if self._kind == "int8" and end == "weight" and module in self._linears:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(self._linears[module], Int8WeightOnlyConfig())

    def finish(self) -> None:
        """All parameters have been set."""
        if self._kind == "fp8":
            for block in self._model.blocks:
                apply_layerwise_casting(block, FP8, self._dtype, skip_modules_pattern=("norm",))


class Handover:
    """Activations [B, n, D] to be taken once, so that nobody holds them when the first layer is through. No list: diffusers'
    offloading makes new ones of those."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._hidden: torch.Tensor | None = hidden

    def take(self) -> torch.Tensor:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return hidden


class Layers(nn.Module):
    """One expert's layers of a stage, run in order; a module of its own so that group offloading sees the order."""

    anchor: torch.Tensor

    def __init__(self, blocks: Sequence[Any], attentions: Sequence[SelfAttention]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._attentions = tuple(attentions)
        # diffusers starts its prefetch from a module that has a tensor of its own.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def forward(self, given: Handover, text: TextKey, timestep_proj: torch.Tensor, around: Surroundings) -> torch.Tensor:
        """The activations `given` through every layer; `timestep_proj` [1, 6, D], or [1, n, 6, D]."""
        hidden = given.take()
        for block, attention in zip(self.blocks, self._attentions, strict=True):
            attention.surroundings = around
            hidden = block(hidden, text, timestep_proj, None)
            attention.surroundings = None
        return hidden


def offload_layers(model: WanTransformer3DModel, layers: Layers, device: torch.device) -> None:
    """Let `layers`, loaded in host memory, come to `device` one by one when they run; the rest of `model` moves there for good.

    On a GPU the next layer is copied from pinned memory while one runs, so at most two are there at once.
    """
    blocks, model.blocks = model.blocks, nn.ModuleList()
    model.to(device)
    model.blocks = blocks
    log = logging.getLogger("diffusers.hooks.group_offloading")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        apply_group_offloading(
            layers, onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=device.type == "cuda",
        )  # fmt: skip
    finally:
        log.setLevel(level)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are stored, scales included."""
    return sum(part.numel() * part.element_size() for value in model.parameters() for part in _parts(value))


def _parts(value: torch.Tensor) -> Iterator[torch.Tensor]:
    names = [*getattr(value, "tensor_data_names", ()), *getattr(value, "optional_tensor_data_names", ())]
    parts = [part for name in names if isinstance(part := getattr(value, name, None), torch.Tensor)]
    yield from parts or [value]
