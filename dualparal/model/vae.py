"""Streaming decode of the causal Wan VAE: blocks in, frames out, bit-equal to one decode of the whole video.

`AutoencoderKLWan` decodes one latent frame at a time with a feature cache, which its own `decode` throws away at the end.
Here the cache lives as long as the video (METHOD.md, "Streaming decode"). Follows `AutoencoderKLWan._decode` and the
de-normalisation in `WanPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from dualparal.model.layout import Checkpoint
from dualparal.model.weights import load_vae
from dualparal.request import TEMPORAL_FACTOR


class StreamingDecoder:
    """Decodes one video after another: `begin` each, then `decode` its latents in order, in pieces of any length."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        config = vae.config
        self.vae = vae
        self.z_dim = int(config.z_dim)
        like = {"device": vae.device, "dtype": vae.dtype}
        self._mean = torch.tensor(config.latents_mean, **like).view(1, -1, 1, 1, 1)
        # 1 / std and a division, as WanPipeline does it, for equal bits.
        self._inverse_std = (1.0 / torch.tensor(config.latents_std, **like)).view(1, -1, 1, 1, 1)
        self._is_first = True
        self.on_frame: Callable[[], None] = lambda: None  # called before each latent frame
        self.begin()

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: str, dtype: torch.dtype = torch.float32) -> StreamingDecoder:
        """Read the VAE of `checkpoint`; raises `CheckpointError` when it is incomplete."""
        return cls(load_vae(checkpoint, dtype).to(device))

    def begin(self) -> None:
        """Forget the video before: the next latent frame is a video's first."""
        self.vae.clear_cache()
        self._is_first = True

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames that follow those decoded so far.

        `latents` [1, z, F, h, w] normalised, as the DiT makes them. Returns [1, 3, frames, H, W] in -1..1, where a video's
        first latent frame gives one frame and every other one four.
        """
        vae = self.vae
        z = latents.to(vae.device, vae.dtype) / self._inverse_std + self._mean
        x = vae.post_quant_conv(z)
        pieces = []
        for frame in x.split(1, dim=2):
            self.on_frame()
            vae._conv_idx = [0]
            first = {"first_chunk": True} if self._is_first else {}
            pieces.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
            self._is_first = False
        out = torch.cat(pieces, dim=2)
        if vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=vae.config.patch_size)
        return out.clamp(-1.0, 1.0)

    @torch.inference_mode()
    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """The latent frame of a single picture, uint8 [H, W, 3]: [1, z, 1, h, w] normalised, float32 on the CPU."""
        return self.encode_clip(picture[None])

    @torch.inference_mode()
    def encode_clip(self, frames: torch.Tensor) -> torch.Tensor:
        """The latent frames of a clip, uint8 [1 + 4k, H, W, 3]: [1, z, 1 + k, h, w] normalised, float32 on the CPU.

        As `AutoencoderKLWan.encode` gives its mode, but for the cache: the video that is being decoded goes on.
        """
        vae, pieces = self.vae, []
        cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
        for piece in (frames[:1], *(frames[1:].split(TEMPORAL_FACTOR) if len(frames) > 1 else ())):
            self.on_frame()
            x = (piece.to(vae.device, vae.dtype) / 127.5 - 1).permute(3, 0, 1, 2)[None]
            if vae.config.patch_size is not None:
                x = patchify(x, patch_size=vae.config.patch_size)
            pieces.append(vae.encoder(x, feat_cache=cache, feat_idx=[0]))
        mode = vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)[0]
        return ((mode - self._mean) * self._inverse_std).float().cpu()


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[1, 3, F, H, W] in -1..1 to [F, H, W, 3] uint8 on the CPU, rounded as diffusers' VideoProcessor does."""
    scaled = (frames[0].float() / 2 + 0.5).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
