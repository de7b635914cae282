"""Fits a map from latents to RGB to a VAE, by least squares of what it decodes to the latents it decodes.

For a model that brings none: pictures drawn here go through its own encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional

from dualparal.model.latent_rgb import LatentRgb

PATCH = 4
NUM_CLIPS = 24
SIDE_CELLS = 8  # latent pixels on each side of a clip
NUM_FRAMES = 5  # two latents: a video's first and one that stands for four frames


def fit_map(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], patch: int = PATCH) -> LatentRgb:
    """The map that comes nearest to `pairs` of normalised latents [z, F, h, w] and their frames [3, 4F - 3, H, W] in -1..1."""
    inputs, targets = [], []
    for latents, frames in pairs:
        height, width = latents.shape[2:]
        ones = torch.ones(1, *latents.shape[1:])
        inputs.append(torch.cat([latents.float().cpu(), ones]).flatten(1).T)
        still = torch.cat([frames[:, :1], frames[:, 1:].unflatten(1, (-1, 4)).mean(dim=2)], dim=1).float().cpu()
        small = functional.adaptive_avg_pool2d(still.transpose(0, 1), (height * patch, width * patch))  # [F, 3, h p, w p]
        cells = small.unflatten(3, (width, patch)).unflatten(2, (height, patch))  # [F, 3, h, p, w, p]
        targets.append(cells.permute(0, 2, 4, 3, 5, 1).reshape(-1, 3 * patch * patch))
    solved = torch.linalg.lstsq(torch.cat(inputs).double(), torch.cat(targets).double(), driver="gelsd").solution.float()
    return LatentRgb(patch, solved[:-1].clone(), solved[-1].clone())


def fit_own_map(vae: AutoencoderKLWan, on_clip: Callable[[], None] = lambda: None) -> LatentRgb:
    """The map of a VAE that nobody has fitted before. It forgets the video that it was at; `on_clip` is called before each
    picture."""
    return fit_map(_own_pairs(vae, on_clip))


@torch.inference_mode()
def _own_pairs(vae: AutoencoderKLWan, on_clip: Callable[[], None]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    config = vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    for clip in _clips(SIDE_CELLS * int(config.scale_factor_spatial or 8)):
        on_clip()
        latents = vae.encode(clip[None].to(vae.device, vae.dtype)).latent_dist.mode()
        frames = vae.decode(latents).sample
        yield (latents[0].float().cpu() - mean) / std, frames[0]


def _clips(side_px: int) -> Iterator[torch.Tensor]:
    """Soft fields of colour and patches of two colours with hard edges, which move: [3, NUM_FRAMES, side, side] in -1..1, the
    same every time."""
    generator = torch.Generator().manual_seed(0)
    for number in range(NUM_CLIPS):
        coarse = torch.randn(1, 3, 3 + number % 4, 3 + number % 4, generator=generator)
        field = functional.interpolate(coarse, (side_px, side_px), mode="bicubic", align_corners=False)[0].tanh()
        if number % 4:
            ground, patches = 2 * torch.rand(2, 3, 1, 1, generator=generator) - 1
            field = torch.where(field[0] > 0.3, patches, ground)
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        moved = [field.roll((frame * shift[0], frame * shift[1]), (1, 2)) for frame in range(NUM_FRAMES)]
        yield torch.stack(moved, dim=1)
