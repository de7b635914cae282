"""Sizes of Wan's parts from their configs: parameters, bytes, tokens. Pure arithmetic, no torch.

Follows `WanTransformer3DModel`, `UMT5EncoderModel` and `AutoencoderKLWan`; tests compare every count with the real modules on
the meta device. Words: D model dim, H heads, F feed-forward dim, p tokens of one latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
USUAL_RANK = 64  # of a LoRA whose file is not here to be read

_PUBLISHED = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
              "freq_dim": 256, "cross_attn_norm": True}  # fmt: skip
WAN_1_3B = {**_PUBLISHED, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
WAN_14B = {**_PUBLISHED, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
WAN_5B = {**_PUBLISHED, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
UMT5_XXL = {"vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
            "relative_attention_num_buckets": 32}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VaeSizes:
    """The numbers of a Wan VAE: parameters, pixels per latent pixel on each side, and the peak of a streamed decode in bytes
    per pixel of the video, by its dtype (a test measures the graph; norms and upsampling work in float32 in any).

    `config` is what the published VAE of its kind is made with, where diffusers' defaults are not it; any means and deviations.
    """

    parameters: int
    spatial_factor: int = 8
    float32_per_pixel: int = 53 * 96 * 4
    half_per_pixel: int = 55 * 96 * 2
    config: Mapping[str, Any] = field(default_factory=dict)

    def num_bytes(self, dtype: str) -> int:
        return self.parameters * DTYPE_BYTES[dtype]

    def decoding_bytes_per_pixel(self, dtype: str) -> int:
        return self.float32_per_pixel if dtype == "float32" else self.half_per_pixel


VAE_2_1 = VaeSizes(parameters=126_892_531)  # base_dim 96; Wan2.2-A14B has it too
VAE_2_2 = VaeSizes(  # of Wan2.2-TI2V-5B
    parameters=704_688_668, spatial_factor=16, float32_per_pixel=22 * 256 * 4, half_per_pixel=22 * 256 * 2,
    config={
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
        "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
)  # fmt: skip
# (transformer config, experts, VAE): what a plan needs before anything is downloaded.
PUBLISHED_MODELS: dict[str, tuple[dict[str, Any], int, VaeSizes]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (WAN_1_3B, 1, VAE_2_1),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (WAN_14B, 1, VAE_2_1),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (WAN_14B, 2, VAE_2_1),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (WAN_5B, 1, VAE_2_2),
}

WITH_TOKEN_TIMES = frozenset({"Wan-AI/Wan2.2-TI2V-5B-Diffusers"})  # of these, what was trained to begin with a picture


def pinned_bytes(num_bytes: int) -> int:
    """What PyTorch takes to pin a tensor of `num_bytes` in host memory: the next power of two (CachingHostAllocator.h)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


@dataclass(frozen=True)
class Parameters:
    """Parameters held in the model's dtype, and those upstream keeps in float32 (`_keep_in_fp32_modules`).

    Of the first, `matrices` are weights of the layers' linear modules and `biases` theirs: what 8-bit quantisation stores.
    """

    cast: int
    float32: int
    matrices: int = 0
    biases: int = 0

    @property
    def count(self) -> int:
        return self.cast + self.float32

    def num_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes in `dtype`. Matrices and biases take one byte each in fp8; in int8 matrices do, and each output 5 more for its
        scale and zero point."""
        plain = self.cast * DTYPE_BYTES[dtype] + self.float32 * 4
        saved = {"fp8": self.matrices + self.biases, "int8": self.matrices}.get(quantization or "", 0)
        return plain - saved * (DTYPE_BYTES[dtype] - 1) + self.biases * 5 * (quantization == "int8")

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.cast + other.cast, self.float32 + other.float32, self.matrices + other.matrices, self.biases + other.biases
        )

    def __mul__(self, times: int) -> Parameters:
        return Parameters(self.cast * times, self.float32 * times, self.matrices * times, self.biases * times)


@dataclass(frozen=True, kw_only=True)
class DiTSizes:
    """The numbers of a Wan transformer's config."""

    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]
    text_dim: int
    freq_dim: int
    has_cross_norm: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DiTSizes:
        """From a transformer's config.json; what it leaves out has diffusers' defaults (those of the 14B model)."""
        full = {**WAN_14B, **{key: value for key, value in config.items() if value is not None}}
        patch_t, patch_h, patch_w = full["patch_size"]
        return cls(
            num_layers=full["num_layers"],
            dim=full["num_attention_heads"] * full["attention_head_dim"],
            num_heads=full["num_attention_heads"],
            ffn_dim=full["ffn_dim"],
            in_channels=full["in_channels"],
            out_channels=full["out_channels"],
            patch_size=(patch_t, patch_h, patch_w),
            text_dim=full["text_dim"],
            freq_dim=full["freq_dim"],
            has_cross_norm=full["cross_attn_norm"],
        )

    def tokens_per_frame(self, height: int, width: int, spatial_factor: int = VAE_2_1.spatial_factor) -> int:
        """p: tokens of one latent frame of a picture of `height` x `width` pixels, `spatial_factor` of them to a latent's."""
        _, patch_h, patch_w = self.patch_size
        return (height // spatial_factor // patch_h) * (width // spatial_factor // patch_w)

    @property
    def layer(self) -> Parameters:
        """One layer: two attentions of four projections and two norms, the feed-forward, a norm, six modulations."""
        attention = 4 * _linear(self.dim, self.dim) + 2 * self.dim
        ffn = _linear(self.dim, self.ffn_dim) + _linear(self.ffn_dim, self.dim)
        biases = 9 * self.dim + self.ffn_dim
        return Parameters(
            2 * attention + ffn, 6 * self.dim + 2 * self.dim * self.has_cross_norm,
            matrices=2 * attention + ffn - biases - 4 * self.dim, biases=biases,
        )  # fmt: skip

    def pinned_layer_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """One layer in pinned host memory: small tensors as they are, each matrix as `pinned_bytes` has it."""
        width = 1 if quantization else DTYPE_BYTES[dtype]
        square, long = self.dim * self.dim * width, self.dim * self.ffn_dim * width
        rounding = 8 * (pinned_bytes(square) - square) + 2 * (pinned_bytes(long) - long)
        return self.layer.num_bytes(dtype, quantization) + rounding

    def lora_elements(self, rank: int) -> int:
        """Numbers of a LoRA of all linear layers of all layers."""
        return rank * self.num_layers * (8 * 2 * self.dim + 2 * (self.dim + self.ffn_dim))

    @property
    def first_stage(self) -> Parameters:
        """Patch embedding, text and time embedding: only the rank of layer 0 has them."""
        patch = _linear(self.in_channels * math.prod(self.patch_size), self.dim)
        text = _linear(self.text_dim, self.dim) + _linear(self.dim, self.dim)
        time = _linear(self.freq_dim, self.dim) + _linear(self.dim, self.dim)
        return Parameters(patch + text + _linear(self.dim, 6 * self.dim), time)

    @property
    def last_stage(self) -> Parameters:
        """Output head: only the rank of the last layer has it."""
        return Parameters(_linear(self.dim, self.out_channels * math.prod(self.patch_size)), 2 * self.dim)

    def share(self, layers: range) -> Parameters:
        """What a rank that runs `layers` holds of one expert."""
        held = self.layer * len(layers)
        if layers.start == 0:
            held += self.first_stage
        if layers.stop == self.num_layers:
            held += self.last_stage
        return held


def umt5_parameters(config: Mapping[str, Any] = UMT5_XXL) -> int:
    """Parameters of a UMT5 encoder (gated feed-forward, a position table in every layer)."""
    dim, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    attention = 4 * dim * inner + config["relative_attention_num_buckets"] * config["num_heads"]
    layer = attention + 3 * dim * config["d_ff"] + 2 * dim
    return int(config["vocab_size"] * dim + config["num_layers"] * layer + dim)


def umt5_float32_parameters(config: Mapping[str, Any] = UMT5_XXL) -> int:
    """Those of them that stay in float32 when the others are float16 (`UMT5EncoderModel._keep_in_fp32_modules`)."""
    return int(config["num_layers"] * config["d_ff"] * config["d_model"])


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
