"""Options that make a stage's layers faster and change their bits: other attention kernels, torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend

from dualparal.errors import RequestError
from dualparal.model.attention_backends import check_attention


def use_attention(model: WanTransformer3DModel, name: str, device: torch.device) -> None:
    """Let every layer of `model` attend through a backend of diffusers' dispatcher.

    The processors must be set. Raises `RequestError` for a name that diffusers does not know, a package that is not installed,
    and kernels that `device` cannot run: the front end has asked `check_attention`, the last word is diffusers'.
    """
    check_attention(name, on_gpu=device.type != "cpu")
    diffusers_log = logging.getLogger("diffusers.models.modeling_utils")
    level = diffusers_log.level
    diffusers_log.setLevel(logging.ERROR)  # "experimental" in every rank, for every expert
    try:
        with attention_backend("native"):  # else diffusers changes it for the whole process, too
            model.set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise RequestError(f"attention={name} cannot be used here: {first} Or use native.", "attention") from None
    finally:
        diffusers_log.setLevel(level)


def compile_layers(layers: Sequence[Any]) -> None:
    """Compile each layer around its attentions, for windows of any length.

    The attentions keep K and V in Python objects that change with every item: they stay as they are, and the norms,
    modulations, residuals and feed-forward between them are compiled, once for all layers.
    """
    for layer in layers:
        for attention in (layer.attn1, layer.attn2):
            object.__setattr__(attention, "forward", torch.compiler.disable(attention.forward))
        layer.compile(dynamic=True)
