"""Sizes of a model by whatever a user calls it, without a download: a published model's are known, a folder's are read."""

from __future__ import annotations

import math
from dataclasses import replace

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint
from dualparal.model.source import find_checkpoint
from dualparal.paths import is_folder
from dualparal.planning.placement import ModelSizes
from dualparal.planning.sizes import VAE_2_1, VAE_2_2, VaeSizes, umt5_float32_parameters
from dualparal.presets import Preset, weights_of


def sizes_of(checkpoint: Checkpoint) -> ModelSizes:
    """The sizes of a checkpoint folder, from its configs and safetensors headers."""
    return ModelSizes(
        config=checkpoint.config("transformer"),
        num_experts=checkpoint.num_experts,
        text_parameters=_count(checkpoint, "text_encoder"),
        text_float32_parameters=umt5_float32_parameters(checkpoint.config("text_encoder")),
        vae=_vae_sizes(checkpoint),
        has_token_times=checkpoint.has_token_times,
    )


def find_sizes(model: str, preset: Preset) -> ModelSizes:
    """The sizes of `model` (a preset's name, a hub id or a folder) with `preset`, before anything is downloaded.

    Raises `CheckpointError` for a hub id that is neither published by Wan's authors nor on this host.
    """
    name, revision = weights_of(model, preset)
    if (known := ModelSizes.published(name)) is not None:
        return known
    if is_folder(name) or name == "pocket":
        return sizes_of(find_checkpoint(name, revision))
    raise CheckpointError(f"the sizes of {name} are not known before its download; give a folder, or one of Wan's own models")


def _vae_sizes(checkpoint: Checkpoint) -> VaeSizes:
    """Its own parameters and scale, and the decoding of the published VAE of its kind, which is at least as large."""
    like = VAE_2_2 if checkpoint.config("vae").get("is_residual") else VAE_2_1
    return replace(like, parameters=_count(checkpoint, "vae"), spatial_factor=checkpoint.latent_sizes[1])


def _count(checkpoint: Checkpoint, part: str) -> int:
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors(part).values())
