"""Measures what this host's device does: one real layer of the model's shape with random weights, what the first and the last
rank do besides (patch embedding and sampler step, output head), the link to host memory, and the VAE's decoder.

FLOPs are counted by `planning.work`, so that a plan's time is FLOPs over this rate. On a GPU the window is one of a real job;
on a CPU it is shorter, so that a pass takes about a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dualparal.method.sampler import SamplerFactory
from dualparal.model.checkpoint import DTYPES
from dualparal.model.feature_cache import CrossAttention, SelfAttention, Surroundings
from dualparal.model.stage import embed_patches, output_head
from dualparal.model.vae import StreamingDecoder
from dualparal.planning.placement import Speed
from dualparal.planning.sizes import VAE_2_1, DiTSizes, VaeSizes
from dualparal.planning.work import layer_flops

TEXT_TOKENS = 512
ENOUGH_S = 1.0  # a pass this long measures well


def calibrate(
    config: Mapping[str, Any], *, device: str, dtype: str, num_tokens: int, attention: str | None = None,
    size_px: tuple[int, int] = (64, 64), vae_dtype: str = "float32",
    vae: VaeSizes = VAE_2_1,
) -> Speed:  # fmt: skip
    """The speed of `device` for a transformer of `config` in `dtype`, at windows of up to `num_tokens` tokens.

    The `vae` has the real shape of its kind and decodes `size_px` (height, width) pixels in `vae_dtype`: on a GPU give a real
    job's, for a small picture measures launches.
    """
    sizes, on = DiTSizes.of(config), torch.device(device)
    with torch.inference_mode():
        flops_per_s, tokens = _layer_rate(sizes, on, DTYPES[dtype], num_tokens, attention)
        embed_s, head_s = _ends_s(sizes, on, DTYPES[dtype], tokens)
        return Speed(
            flops_per_s=flops_per_s, decode_s_per_pixel=_decode_rate(on, size_px, DTYPES[vae_dtype], vae),
            embed_s_per_token=embed_s, head_s_per_token=head_s, sampler_s=_sampler_s(sizes, on, num_tokens),
            link_bytes_per_s=link_rate(on),
        )  # fmt: skip


def _layer_rate(
    sizes: DiTSizes, device: torch.device, dtype: torch.dtype, num_tokens: int, attention: str | None
) -> tuple[float, int]:
    """(FLOP/s of a layer, the window's tokens that it was measured with)."""
    with torch.device("meta"):
        block = WanTransformerBlock(sizes.dim, sizes.ffn_dim, sizes.num_heads, cross_attn_norm=sizes.has_cross_norm)
    block = block.to(dtype).to_empty(device=device).eval()
    for parameter in block.parameters():
        parameter.uniform_(-0.02, 0.02)
    for name, module in block.named_modules():
        if name in ("norm1", "norm2", "norm3"):
            module.float()
    itself, texts = SelfAttention(0), {0: [torch.randn(1, TEXT_TOKENS, sizes.dim, device=device, dtype=dtype)] * 2}
    cross = CrossAttention(texts)
    itself._attention_backend = cross._attention_backend = attention  # type: ignore[assignment]
    block.attn1.set_processor(itself)
    block.attn2.set_processor(cross)
    temb = torch.randn(1, 6, sizes.dim, device=device)

    def seconds_of(tokens: int) -> float:
        rope = torch.polar(torch.ones(1), torch.zeros(1)).to(device).expand(tokens, sizes.dim // sizes.num_heads // 2)
        hidden = torch.randn(2, tokens, sizes.dim, device=device, dtype=dtype)

        def run() -> None:
            itself.surroundings = Surroundings(rope)
            block(hidden, (0, None), temb, None)

        return _median_s(run, device)

    tokens = num_tokens if device.type == "cuda" else min(num_tokens, 256)
    while (seconds := seconds_of(tokens)) < ENOUGH_S / 4 and tokens < num_tokens and device.type != "cuda":
        tokens = min(2 * tokens, num_tokens)
    return layer_flops(sizes, tokens, tokens, text_tokens=TEXT_TOKENS) / seconds, tokens


def _ends_s(sizes: DiTSizes, device: torch.device, dtype: torch.dtype, num_tokens: int) -> tuple[float, float]:
    """Seconds of (patch embedding per token, output head per token and guidance half), of a model without layers."""
    heads = {"num_attention_heads": sizes.num_heads, "attention_head_dim": sizes.dim // sizes.num_heads}
    channels = {"in_channels": sizes.in_channels, "out_channels": sizes.out_channels, "patch_size": sizes.patch_size}
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=0, **heads, **channels)
    for module in (model.patch_embedding, model.proj_out):
        module.to(dtype).to_empty(device=device)
        for parameter in module.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.scale_shift_table = torch.nn.Parameter(torch.randn(1, 2, sizes.dim, device=device), requires_grad=False)
    _, patch_h, patch_w = sizes.patch_size
    rows = max(1, math.isqrt(num_tokens // 2))
    columns = max(1, num_tokens // rows)
    window = torch.randn(1, sizes.in_channels, 1, rows * patch_h, columns * patch_w, device=device, dtype=dtype)
    hidden = torch.randn(2, num_tokens, sizes.dim, device=device, dtype=dtype)
    temb = torch.randn(1, sizes.dim, device=device)
    embed_s = _median_s(lambda: embed_patches(model, window, 2), device) / (rows * columns)
    return embed_s, _median_s(lambda: output_head(model, hidden, temb), device) / (2 * num_tokens)


def _sampler_s(sizes: DiTSizes, device: torch.device, num_tokens: int) -> float:
    """Seconds of one sampler step of latents as large as the window."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    sampler = SamplerFactory(config, num_steps=20, flow_shift=3.0, device=device).new()
    latents = torch.randn(1, sizes.in_channels, 1, num_tokens, math.prod(sizes.patch_size), device=device)
    prediction = torch.randn_like(latents)
    for _ in range(2):  # from the third step on it is of full order
        sampler.step(prediction, latents)
    return _median_s(lambda: sampler.step(prediction, latents), device, repeats=7)


def link_rate(device: torch.device, num_bytes: int = 2**28) -> float | None:
    """Bytes per second of the slower way between a GPU and pinned host memory; None on the CPU."""
    if device.type != "cuda":
        return None
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    there = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return num_bytes / max(_median_s(lambda: here.copy_(there), device), _median_s(lambda: there.copy_(here), device))


def _decode_rate(device: torch.device, size_px: tuple[int, int], dtype: torch.dtype, sizes: VaeSizes) -> float:
    """Seconds per latent frame and output pixel, of frames after a video's first."""
    decoder = StreamingDecoder(AutoencoderKLWan(**sizes.config).to(device, dtype).requires_grad_(False).eval())
    (height, width), factor = size_px, int(decoder.vae.config.scale_factor_spatial)
    latents = torch.randn(1, decoder.z_dim, 1, height // factor, width // factor)
    decoder.decode(latents)
    decoder.decode(latents)  # caches are full from here on
    return _median_s(lambda: decoder.decode(latents), device) / (height * width)


def _median_s(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    run()
    found = []
    for _ in range(repeats):
        _wait_for(device)
        started_s = time.perf_counter()
        run()
        _wait_for(device)
        found.append(time.perf_counter() - started_s)
    return sorted(found)[repeats // 2]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
