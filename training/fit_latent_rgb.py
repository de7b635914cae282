"""Fit the pocket model's map from latents to RGB, which the early look uses: `python -m training.fit_latent_rgb`.

Least squares of what the autoencoder decodes to the latents of scenes that training may draw. Writes `latent_rgb.json` beside
the weights and says how much of held-out pictures the map explains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dualparal.model.latent_rgb import FILE, LatentRgb
from dualparal.model.latent_rgb_fit import fit_map
from dualparal.model.layout import Checkpoint
from dualparal.model.source import POCKET_WEIGHTS
from dualparal.model.weights import load_vae
from dualparal.pocket.world import Prompt, held_out_prompts, random_scene, training_prompts
from training.full_sequence import decode_clip, encode_clip, use_full_sequence
from training.train_vae import to_tensor

NUM_FRAMES = 33


def scene_pairs(
    folder: Path, prompts: Sequence[Prompt], num_scenes: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised latents [z, F, 8, 8] of random scenes, and what they decode to [3, 4F - 3, 64, 64]."""
    vae = use_full_sequence(load_vae(Checkpoint(folder), torch.float32))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    rng = np.random.default_rng(seed)
    with torch.inference_mode():
        for _ in range(num_scenes):
            scene = random_scene(prompts[int(rng.integers(len(prompts)))], rng)
            latents = encode_clip(vae, to_tensor([scene.render(NUM_FRAMES)]))[0]
            yield ((latents - mean) / std)[0], decode_clip(vae, latents)[0].clamp(-1, 1)


def explained(found: LatentRgb, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of the pictures' variance that the map explains."""
    missed, total = [], []
    for latents, frames in pairs:
        shown = found.paint(latents[None]).float().permute(3, 0, 1, 2) / 127.5 - 1
        true = torch.cat([frames[:, :1], frames[:, 1:].unflatten(1, (-1, 4)).mean(dim=2)], dim=1)
        height, width = shown.shape[-2:]
        true = torch.nn.functional.adaptive_avg_pool2d(true.transpose(0, 1), (height, width)).transpose(0, 1)
        missed.append((shown - true).square().mean())
        total.append(true.square().mean() - true.mean().square())
    return 1 - float(torch.stack(missed).mean() / torch.stack(total).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.fit_latent_rgb", description=__doc__)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--weights", type=Path, default=POCKET_WEIGHTS)
    options = parser.parse_args()
    found = fit_map(scene_pairs(options.weights, training_prompts(), options.scenes, 0))
    (options.weights / FILE).write_text(json.dumps(found.to_json()) + "\n", encoding="utf-8")
    share = explained(found, scene_pairs(options.weights, held_out_prompts(), max(1, options.scenes // 5), 1))
    print(f"{options.weights / FILE}: explains {share:.3f} of the variance of held-out pictures")  # noqa: T201


if __name__ == "__main__":
    main()
