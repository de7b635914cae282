"""Run `AutoencoderKLWan`'s encoder and decoder over a whole clip in one pass, for training.

diffusers encodes and decodes latent frame by latent frame with a feature cache. The same numbers come out of one causal pass
over the full clip, several times faster and with gradients: every causal convolution pads with zeros what the cache would
hold, and only the two temporal resamplers treat the first frame specially. This file replaces those two forwards, on one
model, while training; the class itself stays as it is. Equality with the cached path is tested. Follows diffusers'
`autoencoder_kl_wan.py`.

Shapes: b batch, c channels, t frames, h height, w width.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify


def _spatial(module: WanResample, x: torch.Tensor) -> torch.Tensor:
    b, c, t, h, w = x.shape
    x = module.resample(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    return x.view(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)


def _downsample(module: WanResample, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
    x = _spatial(module, x)
    if x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], module.time_conv(x)], dim=2)  # 1 + 2k frames -> 1 + k


def _upsample(module: WanResample, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
    b, c, t, h, w = x.shape
    if t > 1:
        rest = module.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
        rest = rest.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * (t - 1), h, w)
        x = torch.cat([x[:, :, :1], rest], dim=2)  # 1 + k frames -> 1 + 2k
    return _spatial(module, x)


def use_full_sequence(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Replace the temporal resamplers' forwards on this model, in place; `encode_clip` and `decode_clip` then work on it."""
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
            forward = _downsample if module.mode == "downsample3d" else _upsample
            module.forward = MethodType(forward, module)
    return vae


def encode_clip(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [b, z, 1 + k, h/8, w/8] of videos [b, 3, 1 + 4k, h, w] in -1 .. 1."""
    moments = vae.quant_conv(vae.encoder(patchify(video, vae.config.patch_size)))
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def decode_clip(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Videos [b, 3, 1 + 4k, h, w], not clamped, of latents [b, z, 1 + k, h/8, w/8]."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents)), vae.config.patch_size)
