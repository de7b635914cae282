"""Loads one stage's share of a Wan DiT: its own layers' bytes only, cast on the way, on modules built on the meta device.

What each tensor is called and who owns it is `part_shapes`' business; this file moves bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import WanTransformer3DModel
from torch import nn
from torch.overrides import TorchFunctionMode

from dualparal.model.layout import Checkpoint
from dualparal.model.lora import LoraMerge
from dualparal.model.lora_source import Lora
from dualparal.model.low_memory import Quantizer
from dualparal.model.part_shapes import transformer_owners, transformer_shapes
from dualparal.model.validation import check_shape
from dualparal.model.weights import read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightsOnMeta(TorchFunctionMode):
    """Inside, modules are made with their large parameters on the meta device; tables of positions and modulations are whole.

    `torch.device("meta")` computes with those too, by way of torch's compiler, whose import takes a second.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.ones, torch.zeros):
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


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
    is_pinned: bool = False,
) -> WanTransformer3DModel:
    """A WanTransformer3DModel that holds `layers` only (the others are empty `nn.Identity`s without parameters).

    The patch and condition embedding are there iff `layers` starts at 0, the output head iff it ends at the last layer. `loras`
    are merged in float32 before the cast; `quantization` (fp8, int8) stores the layers' linear weights in 8 bits. `is_pinned`:
    into host memory that a GPU can read, tensor by tensor: pinned as a whole the layers would be there twice for a while.
    Raises `CheckpointError` when a tensor is missing or has another shape.
    """
    config = checkpoint.config(component)
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    with WeightsOnMeta():
        model = WanTransformer3DModel(**{key: value for key, value in config.items() if key in known})
    owners = transformer_owners(config)
    wanted = {key for key, owner in owners.items() if _is_own(owner, layers, len(model.blocks))}
    _drop_foreign(model, layers)
    expected = dict(model.named_parameters())
    assert set(expected) == wanted, "the ownership table and diffusers' module disagree"
    tensors = checkpoint.tensors(component)
    for key in wanted:
        check_shape(key, tensors[key], tuple(expected[key].shape))
    merge = LoraMerge(loras, checkpoint.transformers.index(component), transformer_shapes(config)) if loras else None
    quantizer = Quantizer(model, quantization, dtype)
    for key, value in read_tensors({key: tensors[key] for key in wanted}):
        target = torch.float32 if keeps_float32(key) else dtype
        if merge is not None:
            value = merge.apply(key, value)
        stored = quantizer.storage_dtype(key, target)
        value = value.to(device, target, copy=True).to(stored)
        if is_pinned and _is_in_layer(key) and quantization != "int8":  # which makes new tensors of these
            value = value.pin_memory()
        set_module_tensor_to_device(model, key, device, value=value, dtype=stored, clear_cache=False)
        quantizer.after(key)
    quantizer.finish()
    model.rope.to(device)
    return model.requires_grad_(False).eval()


def _is_own(owner: int, layers: range, num_layers: int) -> bool:
    return owner in layers or (owner == -1 and layers.start == 0) or (owner == num_layers and layers.stop == num_layers)


def _is_in_layer(key: str) -> bool:
    return key.startswith("blocks.")


def _drop_foreign(model: WanTransformer3DModel, layers: range) -> None:
    num_layers = len(model.blocks)
    model.blocks = nn.ModuleList([block if number in layers else nn.Identity() for number, block in enumerate(model.blocks)])
    if layers.start:
        model.patch_embedding = model.condition_embedder = None
    if layers.stop != num_layers:
        model.proj_out = None
        del model.scale_shift_table
