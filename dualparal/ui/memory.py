"""Whether a request fits the devices at hand: `core.estimate`'s plan against what the host and its GPUs have. No torch."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.core.estimate import memory_plan, workload_of
from dualparal.core.rules import rules_of
from dualparal.core.sizes import DTYPE_BYTES
from dualparal.model.layout import Checkpoint, split_layers
from dualparal.request import GenerationRequest
from dualparal.runtime.devices import place
from dualparal.ui.words import size

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of the rank that needs most, and a sentence when it cannot be had."""

    bytes_per_rank: int
    refusal: str | None


def memory_need(engine: Engine, request: GenerationRequest, device: str) -> MemoryNeed:
    """What the resolved `request` will hold on this engine's ranks, and whether that fits."""
    return _need(engine.checkpoint, request.model_copy(update={"prompt": "", "seed": 0}), engine.ranks, device, engine.dtype)


@lru_cache(maxsize=256)
def _need(checkpoint: Checkpoint, request: GenerationRequest, ranks: int, device: str, dtype: str) -> MemoryNeed:
    assert request.height and request.width
    devices, codec_device = place(device, ranks)
    on_gpu = devices[0] != "cpu"
    layers = [len(stage) for stage in split_layers(checkpoint.num_layers, ranks, None)]
    plan = memory_plan(
        workload_of(request, checkpoint.config("transformer"), layers, rules=rules_of(request)),
        height=request.height, width=request.width, dtype=dtype, num_experts=checkpoint.num_experts,
        codec_rank=devices.index(codec_device) if on_gpu and codec_device in devices else None,
        text_encoder_bytes=num_parameters(checkpoint, "text_encoder") * DTYPE_BYTES[dtype],
        vae_bytes=num_parameters(checkpoint, "vae") * DTYPE_BYTES["float32"], on_gpu=on_gpu,
    )  # fmt: skip
    if on_gpu:
        have = gpu_bytes()
        return MemoryNeed(plan.most, plan.refusal(have) if have else None)
    need, have = sum(rank.total for rank in plan.ranks) + plan.codec, host_bytes()
    refusal = None
    if need > have:
        refusal = (
            f"this needs {size(need)} of memory and the computer has {size(have)}; ask for a smaller picture, a shorter "
            "block (num_per_block) or less context (num_cat)"
        )
    return MemoryNeed(plan.most, refusal)


@lru_cache(maxsize=16)
def num_parameters(checkpoint: Checkpoint, component: str) -> int:
    """Numbers stored for a component, from the headers of its safetensors files."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors(component).values())


def host_bytes() -> int:
    """Memory of this computer or of the container it is run in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CGROUP_LIMITS:
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


@lru_cache(maxsize=1)
def gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA card, from nvidia-smi; None when it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(int(line) for line in told.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
