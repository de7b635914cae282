"""Options that make a stage's layers faster and change their bits: other attention kernels, torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from dualparal.errors import RequestError
from dualparal.model.attention_backends import CPU_BACKENDS


def use_attention(model: WanTransformer3DModel, name: str, device: torch.device) -> None:
    """Let every layer of `model` attend through a backend of diffusers' dispatcher.

    The processors must be set. Raises `RequestError` for a name that diffusers does not know, a package that is not installed,
    and kernels that `device` cannot run: the front end has asked `check_attention`, the last word is diffusers'.
    """
    known = sorted(backend.value for backend in AttentionBackendName if not backend.value.startswith("_"))
    if name.lower() not in {backend.value for backend in AttentionBackendName}:
        raise RequestError(f"attention={name!r} is not known to diffusers; use one of {', '.join(known)}", "attention")
    if device.type == "cpu" and name.lower() not in CPU_BACKENDS:
        raise RequestError(f"attention={name} needs a GPU; on the CPU use native", "attention")
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
