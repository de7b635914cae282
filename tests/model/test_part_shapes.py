"""The tables of tensors that a VAE and a text encoder must hold, against the real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from dualparal.model.part_shapes import text_encoder_shapes, vae_shapes
from dualparal.planning.sizes import UMT5_XXL, VAE_2_2

SMALL: dict[str, Any] = {
    "base_dim": 16, "decoder_base_dim": 16, "z_dim": 12, "dim_mult": [1, 2, 4], "num_res_blocks": 1,
    "temperal_downsample": [True, True], "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "latents_mean": [0.0] * 12, "latents_std": [1.0] * 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {}, SMALL, {"attn_scales": [1.0, 0.25]}, {"decoder_base_dim": 48, "dim_mult": [1, 1, 2, 4], "num_res_blocks": 3},
        VAE_2_2.config, {**SMALL, "is_residual": True, "dim_mult": [1, 2, 2]},
    ],
    ids=["Wan's own", "the pocket model's", "attention between", "another decoder", "Wan2.2's", "small and residual"],
)  # fmt: skip
def test_vae(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    assert vae_shapes(config) == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
@pytest.mark.parametrize("config", [UMT5_XXL, {}, {"num_layers": 3, "num_heads": 5, "d_kv": 7, "d_model": 20}])
def test_text_encoder(config: dict[str, Any], feed_forward: str) -> None:
    full = {**config, "feed_forward_proj": feed_forward}
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**full))
    real = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    table = real.pop("encoder.embed_tokens.weight")
    assert real.setdefault("shared.weight", table) == table
    assert text_encoder_shapes(full) == real
