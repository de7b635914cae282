"""What `app.py` opens when it is given no flags: the largest preset that this machine's GPUs and disk can take.

A Hugging Face Space runs `app.py` as it is, on whatever hardware its owner has picked. Weights are counted, not downloaded.
Needs no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dualparal.devices import bytes_per_device, count_gpus
from dualparal.paths import is_folder
from dualparal.planning.job_plan import plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory_table import gigabytes
from dualparal.planning.placement import ModelSizes, Placement
from dualparal.planning.sizes import DiTSizes
from dualparal.presets import USUAL, Preset, complete

PREFERRED = ("wan2.1-14b-480p", "wan2.1-1.3b-480p")  # the best first; 720p and two experts are for those who ask for them
MAX_RANKS = 8  # one host's cards, and about where a longer pipeline stops paying (docs/scaling.md)
HUB_BYTES = 4  # per parameter on the hub, at most: Wan's transformers and text encoder are stored in float32


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`preset` is None for the embedded model; `reason` is one line for the log."""

    preset: Preset | None
    ranks: int
    reason: str


def choose_setup(
    presets: Mapping[str, Preset], *, num_gpus: int, bytes_per_gpu: int | None, free_bytes: int, has_model: bool = False
) -> Setup:
    """The setup for `num_gpus` cards of `bytes_per_gpu` (None: not known) and `free_bytes` of disk for the weights.

    `has_model`: the weights may be there already, so that a full disk is no objection.
    """
    if num_gpus == 0:
        return Setup(preset=None, ranks=1, reason="no GPU is visible: the embedded model on the CPU")
    reason = f"no preset fits {num_gpus} GPUs"
    if bytes_per_gpu is None:
        return Setup(
            preset=None, ranks=1, reason="the GPUs' memory is not known (no nvidia-smi): the embedded model; use --preset"
        )
    reason += f" with {gigabytes(bytes_per_gpu)}"
    for preset in (presets[name] for name in PREFERRED if name in presets):
        sizes = ModelSizes.published(preset.model)
        ranks = sizes and _ranks_that_fit(preset, sizes, num_gpus, bytes_per_gpu)
        if sizes is None or not ranks:
            continue
        needed = download_bytes(sizes)
        if needed > free_bytes and not has_model:
            reason = f"{preset.name} needs {gigabytes(needed)} of disk and there are {gigabytes(free_bytes)}"
            continue
        how = f"{preset.name} with {ranks} ranks on {num_gpus} GPUs of {gigabytes(bytes_per_gpu)}"
        return Setup(preset=preset, ranks=ranks, reason=how)
    return Setup(preset=None, ranks=1, reason=f"{reason}: the embedded model")


def choose_for_this_host(presets: Mapping[str, Preset]) -> Setup:
    """`choose_setup` for what this process can see."""
    cache = Path(
        os.path.abspath(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    )  # as the library does
    there = next(folder for folder in (cache, *cache.parents) if is_folder(folder))
    has_model = any((cache / "hub").glob("models--Wan-AI--*"))
    return choose_setup(
        presets, num_gpus=count_gpus(), bytes_per_gpu=bytes_per_device("cuda"), free_bytes=shutil.disk_usage(there).free,
        has_model=has_model,
    )  # fmt: skip


def download_bytes(sizes: ModelSizes) -> int:
    """What a model takes on disk, at most."""
    config = DiTSizes.of(sizes.config)
    transformer = config.share(range(config.num_layers)).count * sizes.num_experts
    return (transformer + sizes.text_parameters + sizes.vae.parameters) * HUB_BYTES


def _ranks_that_fit(preset: Preset, sizes: ModelSizes, num_gpus: int, bytes_per_gpu: int) -> int | None:
    """As many ranks as there are cards, or one card less to leave the codec its own; None when neither fits. The text encoder
    is where an engine would have it by itself."""
    num_layers = DiTSizes.of(sizes.config).num_layers
    most = min(num_gpus, MAX_RANKS, num_layers)
    for ranks in range(most, max(0, most - 2), -1):
        placement = Placement(
            layers=tuple(len(stage) for stage in split_layers(num_layers, ranks)), dtype=preset.dtype,
            vae_dtype=preset.vae_dtype, codec_rank=ranks - 1 if ranks == num_gpus else None, bytes_per_device=bytes_per_gpu,
            text_encoder="auto",
        )  # fmt: skip
        asked = complete(USUAL, preset, ranks=ranks, num_experts=sizes.num_experts)
        if plan_job(asked, sizes, settle_text_encoder(asked, sizes, placement), is_short=True).refusal is None:
            return ranks
    return None
