"""The published models at full size on the meta device: every key of the real layout belongs to exactly one rank."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from dualparal.model.checkpoint import _is_own
from dualparal.model.part_shapes import transformer_owners, transformer_shapes, vae_shapes
from dualparal.planning.layer_split import split_layers
from dualparal.planning.sizes import PUBLISHED_MODELS


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_every_key_has_one_owner(name: str) -> None:
    """Wan2.2's two experts have one shape, and a rank holds the same layers of both."""
    config, num_experts, vae = PUBLISHED_MODELS[name]
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    real = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    owners, num_layers = transformer_owners(config), config["num_layers"]
    assert transformer_shapes(config) == real, "the table and diffusers' module disagree"
    assert owners.keys() == real.keys()
    assert num_experts == (2 if "A14B" in name else 1)
    with torch.device("meta"):
        decoder = AutoencoderKLWan(**vae.config)
    assert vae_shapes(vae.config) == {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    assert decoder.config.z_dim == config["in_channels"] and decoder.config.scale_factor_spatial == vae.spatial_factor
    for ranks in range(1, 9):
        stages = split_layers(num_layers, ranks)
        holders = {key: [r for r, layers in enumerate(stages) if _is_own(owners[key], layers, num_layers)] for key in real}
        assert all(len(found) == 1 for found in holders.values())
        assert all(found == [0] for key, found in holders.items() if key.startswith(("condition_embedder", "patch_embedding")))
        assert holders["proj_out.weight"] == holders["scale_shift_table"] == [ranks - 1]
        assert {rank for found in holders.values() for rank in found} == set(range(ranks))
