"""What a plan is made for: a model's sizes, which part of it runs where, and how fast a device is. Numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualparal.errors import RequestError
from dualparal.method.grid import Grid
from dualparal.options import EngineOptions
from dualparal.planning.sizes import (
    DTYPE_BYTES,
    PUBLISHED_MODELS,
    USUAL_RANK,
    VAE_2_1,
    WITH_TOKEN_TIMES,
    DiTSizes,
    VaeSizes,
    umt5_float32_parameters,
    umt5_parameters,
)
from dualparal.request import Settings


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The numbers of one model: its transformer's config, experts, and parameters of its other parts."""

    config: Mapping[str, Any]
    num_experts: int = 1
    text_parameters: int = umt5_parameters()
    text_float32_parameters: int = umt5_float32_parameters()  # of these, where the others are float16
    vae: VaeSizes = VAE_2_1
    has_token_times: bool = False  # a picture is clean beside noise, so that each token is modulated by itself
    lora_elements: Callable[[Sequence[str]], int | None] = field(default=lambda loras: None, compare=False)

    def elements_of(self, loras: Sequence[str]) -> int:
        """Numbers in all that a video's LoRAs hold; of those that are not here as if of `USUAL_RANK`, for every expert."""
        if not loras:
            return 0
        sizes = DiTSizes.of(self.config)
        known = self.lora_elements(loras)
        times = sum(1 if spec.startswith(("high:", "low:")) else self.num_experts for spec in loras)
        return sizes.lora_elements(USUAL_RANK) * times if known is None else known

    def text_bytes(self, dtype: str) -> int:
        """Bytes of the text encoder in `dtype`."""
        more = self.text_float32_parameters * (4 - DTYPE_BYTES["float16"]) if dtype == "float16" else 0
        return self.text_parameters * DTYPE_BYTES[dtype] + more

    def tokens_per_frame(self, height: int, width: int) -> int:
        """p: tokens of one latent frame of a picture of `height` x `width` pixels."""
        return DiTSizes.of(self.config).tokens_per_frame(height, width, self.vae.spatial_factor)

    def check_size(self, request: Settings) -> None:
        """Raise `RequestError` for a picture that is not made of whole patches."""
        _, *patches = DiTSizes.of(self.config).patch_size
        for (name, size), patch in zip((("height", request.height), ("width", request.width)), patches, strict=True):
            if size % (step := self.vae.spatial_factor * patch):
                low = max(step, size // step * step)
                raise RequestError(
                    f"{name}={size} does not fit this model, whose pictures are multiples of {step}; use {low} or {low + step}",
                    name,
                )

    @classmethod
    def published(cls, hub_id: str) -> ModelSizes | None:
        """Sizes of a published Wan model, known without a download; None for any other."""
        known = PUBLISHED_MODELS.get(hub_id)
        if known is None:
            return None
        config, num_experts, vae = known
        return cls(config=config, num_experts=num_experts, vae=vae, has_token_times=hub_id in WITH_TOKEN_TIMES)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part runs where: `layers[s]` layers on stage s of each of `guidance` rings, each rank on a GPU of its own or all on
    this host's CPU.

    `codec_rank`: the rank whose GPU the codec shares, None for a GPU of its own. `bytes_per_device`: of each GPU, or of the
    host; None when not known. `text_encoder`: keep, free or cpu (where it is while a job is denoised), or auto until
    `settle_text_encoder`. `quantization`: None, fp8 or int8. `is_offloaded`: layers wait in host memory;
    `is_cache_offloaded`: so do left neighbours' K and V.
    """

    layers: tuple[int, ...]
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    codec_rank: int | None = None
    on_gpu: bool = True
    bytes_per_device: int | None = None
    text_encoder: str = "keep"
    quantization: str | None = None
    is_offloaded: bool = False
    is_cache_offloaded: bool = False
    guidance: int = 1

    @property
    def grid(self) -> Grid:
        return Grid(len(self.layers), self.guidance)

    @property
    def codec_stage(self) -> int | None:
        """The stage of `codec_rank`."""
        return None if self.codec_rank is None else self.grid.stage_of(self.codec_rank)

    @classmethod
    def of(cls, options: EngineOptions, **where: Any) -> Placement:
        """What settled `options` (dtypes and device known) say, and `where` the rest is."""
        assert options.dtype and options.vae_dtype
        return cls(
            dtype=options.dtype, vae_dtype=options.vae_dtype, text_encoder=options.text_encoder,
            quantization=options.quantization, is_offloaded=options.offload, is_cache_offloaded=options.offload_cache,
            on_gpu=options.device != "cpu", guidance=options.guidance_parallel, **where,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device does: FLOP/s of a stage's layers, seconds of VAE decode per latent frame and output pixel.

    Seconds of what the first and the last rank do besides: patch embedding per token of the window, output head per own token
    and guidance half (None: not measured, taken by their FLOPs), and one sampler step. `link_bytes_per_s`: of copies between
    device and pinned host memory, one way (None: not measured, what waits there is taken to arrive in time).
    """

    flops_per_s: float
    decode_s_per_pixel: float = 0.0
    embed_s_per_token: float | None = None
    head_s_per_token: float | None = None
    sampler_s: float = 0.0
    link_bytes_per_s: float | None = None
