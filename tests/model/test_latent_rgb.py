"""The map from latents to RGB: pictures equal a slow statement, the right map is found, a fitted one shows what a VAE shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from dualparal.model.latent_rgb import FILE, OF_WAN, LatentRgb, find_map, read_map, store_map
from dualparal.model.latent_rgb_fit import fit_map, fit_own_map
from dualparal.model.layout import Checkpoint
from dualparal.model.source import POCKET_WEIGHTS
from dualparal.model.vae import StreamingDecoder
from dualparal.pocket.world import held_out_prompts
from training.fit_latent_rgb import explained, scene_pairs


def slow_paint(rgb: LatentRgb, latents: np.ndarray) -> np.ndarray:
    """Pixel by pixel: `latents` [z, F, h, w]."""
    _, frames, height, width = latents.shape
    patch = rgb.patch
    shown = np.zeros((frames, height * patch, width * patch, 3), np.uint8)
    for frame, y, x, colour in np.ndindex(shown.shape):
        weights = rgb.weights[:, (y % patch * patch + x % patch) * 3 + colour].numpy()
        bias = float(rgb.bias[(y % patch * patch + x % patch) * 3 + colour])
        value = float(latents[:, frame, y // patch, x // patch] @ weights) + bias
        shown[frame, y, x, colour] = round(min(max((value + 1) / 2, 0), 1) * 255)
    return shown


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_pictures_equal_a_slow_statement(patch: int) -> None:
    generator = torch.Generator().manual_seed(patch)
    size = 3 * patch * patch
    rgb = LatentRgb(patch, torch.randn(5, size, generator=generator) / 3, torch.randn(size, generator=generator) / 3)
    latents = torch.randn(1, 5, 3, 2, 4, generator=generator)
    shown = rgb.paint(latents).numpy()
    assert shown.dtype == np.uint8 and shown.shape == (3, 2 * patch, 4 * patch, 3)
    assert np.abs(shown.astype(int) - slow_paint(rgb, latents[0].numpy())).max() <= 1  # float32 sums in another order


def test_the_published_map_is_that_of_wan(tmp_path: Path, tiny: Path) -> None:
    """rgb = (x·F + b + 1)/2, and it is taken for a VAE with Wan2.1's latents only."""
    published = json.loads(OF_WAN.read_text())
    folder = tmp_path / "wan"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert find_map(Checkpoint(folder), tmp_path) is None
    config |= {"z_dim": 16, "latents_mean": published["latents_mean"]}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    rgb = find_map(Checkpoint(folder), tmp_path)
    assert rgb is not None and rgb.patch == 1 and rgb.weights.shape == (16, 3)
    latents = torch.zeros(1, 16, 1, 1, 1)
    latents[0, 2] = 1.0
    wanted = [round((x + b + 1) / 2 * 255) for x, b in zip((0.3568, 0.2548, 0.1747), (-0.1835, -0.0868, -0.3360), strict=True)]
    assert rgb.paint(latents).flatten().tolist() == wanted
    assert list(AutoencoderKLWan().config.latents_mean) == published["latents_mean"]


def test_what_is_no_map_is_not_taken(tmp_path: Path) -> None:
    whole = {"patch": 1, "weights": [[0.1, 0.2, 0.3]] * 4, "bias": [0, 0, 0]}
    for number, text in enumerate(
        [
            "", "[]", "{}", "[" * 100_000, json.dumps(whole | {"weights": [[1, 2, 3]] * 3}), json.dumps(whole | {"patch": 2}),
            json.dumps(whole | {"bias": [float("nan")] * 3}), json.dumps(whole | {"patch": 0}),
        ]
    ):  # fmt: skip
        (tmp_path / f"{number}.json").write_text(text)
        assert read_map(tmp_path / f"{number}.json", 4) is None, text[:100]
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert read_map(tmp_path / "whole.json", 4) is not None
    assert read_map(tmp_path / "none.json", 4) is None


def test_a_linear_decoder_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    true = LatentRgb(2, torch.randn(3, 12, generator=generator) / 9, torch.randn(12, generator=generator) / 9)

    def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        latents = torch.randn(3, 3, 4, 5, generator=generator)
        flat = torch.einsum("zfhw,zk->fhwk", latents, true.weights) + true.bias
        cells = flat.view(3, 4, 5, 2, 2, 3).transpose(2, 3).reshape(3, 8, 10, 3).permute(3, 0, 1, 2)
        frames = torch.cat([cells[:, :1], cells[:, 1:].repeat_interleave(4, dim=1)], dim=1)
        return [(latents, frames.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3))]

    found = fit_map(pairs(), patch=2)
    assert torch.allclose(found.weights, true.weights, atol=1e-4) and torch.allclose(found.bias, true.bias, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny_ti2v"])
def test_a_map_is_fitted_to_a_models_own_vae_once(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Random weights are no pictures, but what the map shows still goes with what the VAE decodes to."""
    checkpoint = Checkpoint(request.getfixturevalue(name))
    decoder = StreamingDecoder.load(checkpoint, device="cpu")
    clips: list[None] = []
    found = fit_own_map(decoder.vae, lambda: clips.append(None))
    assert clips
    assert torch.equal(found.weights, fit_own_map(decoder.vae).weights)
    store_map(found, checkpoint, tmp_path / "maps")
    kept = find_map(checkpoint, tmp_path / "maps")
    assert kept is not None and torch.allclose(kept.weights, found.weights, atol=1e-4)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "maps").iterdir()] == [0o600]


def test_a_fitted_map_of_a_trained_vae_shows_its_pictures(tmp_path: Path) -> None:
    """Fitted to drawn fields of colour only, it explains scenes too, if not as well as the one fitted to scenes."""
    decoder = StreamingDecoder.load(Checkpoint(POCKET_WEIGHTS), device="cpu")
    own = fit_own_map(decoder.vae)
    shipped = find_map(Checkpoint(POCKET_WEIGHTS), tmp_path)
    assert shipped is not None and (POCKET_WEIGHTS / FILE).is_file()
    shares = [explained(rgb, scene_pairs(POCKET_WEIGHTS, held_out_prompts(), 3, 1)) for rgb in (own, shipped)]
    assert shares[1] > 0.4 and shares[0] > 0.2, shares
