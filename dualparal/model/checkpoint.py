"""Loads one stage's share of a Wan DiT: its own layers' bytes only, cast on the way, on modules built on the meta device.

What each tensor is called and who owns it is `layout`'s business; this file moves bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors import safe_open
from torch import nn

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint, transformer_owners, transformer_shapes
from dualparal.model.lora import LoraMerge
from dualparal.model.lora_source import Lora
from dualparal.model.low_memory import Quantizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def keeps_float32(key: str) -> bool:
    """Whether upstream keeps this parameter in float32 whatever the model's dtype (`_keep_in_fp32_modules`)."""
    return not set(key.split(".")).isdisjoint(WanTransformer3DModel._keep_in_fp32_modules)


def load_transformer_share(
    checkpoint: Checkpoint,
    component: str,
    layers: range,
    *,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[Lora] = (),
    quantization: str | None = None,
) -> WanTransformer3DModel:
    """A WanTransformer3DModel that holds `layers` only (the others are empty `nn.Identity`s without parameters).

    The patch and condition embedding are there iff `layers` starts at 0, the output head iff it ends at the last layer. `loras`
    are merged in float32 before the cast; `quantization` (fp8, int8) stores the layers' linear weights in 8 bits.
    Raises `CheckpointError` when a tensor is missing or has another shape.
    """
    config = checkpoint.config(component)
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    with torch.device("meta"):
        model = WanTransformer3DModel(**{key: value for key, value in config.items() if key in known})
    owners = transformer_owners(config)
    wanted = {key for key, owner in owners.items() if _is_own(owner, layers, len(model.blocks))}
    _drop_foreign(model, layers)
    expected = dict(model.named_parameters())
    assert set(expected) == wanted, "the ownership table and diffusers' module disagree"
    tensors = checkpoint.tensors(component)
    for key in wanted:
        if tensors[key].shape != tuple(expected[key].shape):
            raise CheckpointError(
                f"{tensors[key].file}: {key} has shape {list(tensors[key].shape)}, the config says {list(expected[key].shape)}"
            )
    merge = LoraMerge(loras, checkpoint.transformers.index(component), transformer_shapes(config)) if loras else None
    quantizer = Quantizer(model, quantization, dtype)
    for key, value in _read({key: tensors[key].file for key in wanted}):
        target = torch.float32 if keeps_float32(key) else dtype
        if merge is not None:
            value = merge.apply(key, value)
        stored = quantizer.storage_dtype(key, target)
        value = value.to(device, target, copy=True).to(stored)
        set_module_tensor_to_device(model, key, device, value=value, dtype=stored, clear_cache=False)
        quantizer.after(key)
    quantizer.finish()
    # Buffers of the meta model hold nothing; the table is small and is made anew, in upstream's precision.
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return model.requires_grad_(False).eval()


def _is_own(owner: int, layers: range, num_layers: int) -> bool:
    return owner in layers or (owner == -1 and layers.start == 0) or (owner == num_layers and layers.stop == num_layers)


def _drop_foreign(model: WanTransformer3DModel, layers: range) -> None:
    num_layers = len(model.blocks)
    model.blocks = nn.ModuleList([block if number in layers else nn.Identity() for number, block in enumerate(model.blocks)])
    if layers.start:
        model.patch_embedding = model.condition_embedder = None
    if layers.stop != num_layers:
        model.proj_out = None
        del model.scale_shift_table


def _read(files: dict[str, Path]) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) file by file, in the order of the file; at most one tensor is in flight."""
    for file in sorted(set(files.values())):
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:
                raise CheckpointError(f"{file} cannot be opened as safetensors: {error}") from None
            for key in opened.keys():  # noqa: SIM118 - not iterable by itself
                if files.get(key) == file:
                    yield key, opened.get_tensor(key)
