"""One block equals diffusers' own `WanPipeline` within 1e-5 in float32: same noise, embeddings and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from dualparal.model.layout import Checkpoint
from dualparal.model.vae import StreamingDecoder
from tests.local_ring import denoise_in_threads
from tests.texts import joined, some_texts

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def pipeline_of() -> Callable[[Path], WanPipeline]:
    kept: dict[Path, WanPipeline] = {}

    def find(folder: Path) -> WanPipeline:
        if folder not in kept:
            kept[folder] = WanPipeline.from_pretrained(folder, dtype=torch.float32)
            kept[folder].set_progress_bar_config(disable=True)
        return kept[folder]

    return find


def run_pipeline(
    pipeline: WanPipeline,
    noise: torch.Tensor,
    texts: list[torch.Tensor],
    steps: int,
    guidance: tuple[float, float],
    flow_shift: float = 3.0,
) -> torch.Tensor:
    """Latents [1, C, F, h, w] as diffusers makes them."""
    has_two, factor = pipeline.transformer_2 is not None, pipeline.vae_scale_factor_spatial
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=flow_shift)
    return pipeline(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1] if len(texts) > 1 else None,
        height=noise.shape[3] * factor, width=noise.shape[4] * factor, num_frames=(noise.shape[2] - 1) * 4 + 1,
        num_inference_steps=steps, guidance_scale=guidance[0], guidance_scale_2=guidance[1] if has_two else None,
        latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip


def compare(
    pipeline: WanPipeline,
    folder: Path,
    *,
    steps: int,
    guidance: tuple[float, float] = (5.0, 5.0),
    num_frames: int = 4,
    size: tuple[int, int] = (4, 4),
    ranks: int = 1,
    flow_shift: float = 3.0,
    lengths: tuple[int, int] = (7, 7),
) -> None:
    noise = torch.randn(1, 4, num_frames, *size, generator=torch.Generator().manual_seed(steps))
    texts = some_texts(guided=guidance[0] > 1, lengths=lengths)
    expected = run_pipeline(pipeline, noise, texts[0], steps, guidance, flow_shift)
    found = joined(
        denoise_in_threads(
            folder, latents_num=num_frames, num_per_block=num_frames, num_cat=1, steps=steps, texts=texts, guidance=guidance,
            boundary_ratio=pipeline.config.boundary_ratio, size=size, ranks=ranks, noise=[noise], flow_shift=flow_shift,
        )
    )  # fmt: skip
    assert expected.std() > 0.3
    worst = (found - expected).abs().max().item()
    assert worst <= TOLERANCE, f"off by {worst}"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
def test_one_expert(tiny: Path, pipeline_of: Callable[[Path], WanPipeline], steps: int, guidance: float) -> None:
    compare(pipeline_of(tiny), tiny, steps=steps, guidance=(guidance, guidance))


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (5.0, 5.0), (4.0, 3.0), (1.0, 5.0), (5.0, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
def test_two_experts(
    tiny_two: Path, pipeline_of: Callable[[Path], WanPipeline], steps: int, guidance: tuple[float, float]
) -> None:
    compare(pipeline_of(tiny_two), tiny_two, steps=steps, guidance=guidance, num_frames=2)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("num_frames", "size"), [(1, (4, 4)), (3, (2, 8)), (5, (8, 2)), (9, (6, 10))])
def test_sizes(
    tiny: Path, pipeline_of: Callable[[Path], WanPipeline], num_frames: int, size: tuple[int, int], ranks: int
) -> None:
    compare(pipeline_of(tiny), tiny, steps=4, num_frames=num_frames, size=size, ranks=ranks)


@pytest.mark.parametrize("flow_shift", [1.0, 5.0, 12.0])
def test_flow_shift(tiny_two: Path, pipeline_of: Callable[[Path], WanPipeline], flow_shift: float) -> None:
    compare(pipeline_of(tiny_two), tiny_two, steps=10, flow_shift=flow_shift, ranks=2)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("steps", "guidance"), [(1, 5.0), (4, 1.0), (20, 5.0)])
def test_a_timestep_for_each_token(
    tiny_ti2v: Path, pipeline_of: Callable[[Path], WanPipeline], steps: int, guidance: float, ranks: int
) -> None:
    """Of text to video it is the same for all of them."""
    pipeline = pipeline_of(tiny_ti2v)
    assert pipeline.config.expand_timesteps and pipeline.vae_scale_factor_spatial == 16
    compare(pipeline, tiny_ti2v, steps=steps, guidance=(guidance, guidance), size=(4, 6), ranks=ranks, flow_shift=5.0)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("steps", "guidance"), [(1, 5.0), (4, 1.0), (20, 5.0)])
def test_a_film_that_begins_with_a_picture(
    tiny_ti2v: Path, pipeline_of: Callable[[Path], WanPipeline], steps: int, guidance: float, ranks: int
) -> None:
    """The picture's latent is the film's first, its tokens are at timestep 0, and it comes out as it went in."""
    plain, size, num_frames = pipeline_of(tiny_ti2v), (4, 6), 5
    parts = {name: part for name, part in plain.components.items() if part is not None}
    pipeline = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(plain.scheduler).from_config(plain.scheduler.config, flow_shift=5.0)
    generator = torch.Generator().manual_seed(steps)
    noise = torch.randn(1, 4, num_frames, *size, generator=generator)
    picture = torch.randint(0, 256, (size[0] * 16, size[1] * 16, 3), dtype=torch.uint8, generator=generator)
    texts = some_texts(guided=guidance > 1)
    expected = pipeline(
        Image.fromarray(picture.numpy()), prompt_embeds=texts[0][0],
        negative_prompt_embeds=texts[0][1] if guidance > 1 else None, height=size[0] * 16, width=size[1] * 16,
        num_frames=4 * num_frames - 3, num_inference_steps=steps, guidance_scale=guidance, latents=noise.clone(),
        output_type="latent",
    ).frames  # fmt: skip
    start = StreamingDecoder.load(Checkpoint(tiny_ti2v), device="cpu").encode_picture(picture)
    blocks = denoise_in_threads(
        tiny_ti2v, latents_num=num_frames - 1, num_per_block=num_frames - 1, num_cat=1, steps=steps, texts=texts,
        guidance=(guidance, guidance), size=size, ranks=ranks, noise=[noise[:, :, 1:]], flow_shift=5.0, ghost=start,
    )  # fmt: skip
    worst = (torch.cat([start, joined(blocks)], dim=2) - expected).abs().max().item()
    assert expected[:, :, 1:].std() > 0.3 and worst <= TOLERANCE, f"off by {worst}"


def test_many_shards(tiny_sharded: Path, pipeline_of: Callable[[Path], WanPipeline]) -> None:
    compare(pipeline_of(tiny_sharded), tiny_sharded, steps=4, ranks=4)


def test_full_length_embeddings(tiny: Path, pipeline_of: Callable[[Path], WanPipeline]) -> None:
    compare(pipeline_of(tiny), tiny, steps=4, lengths=(512, 512))


def test_bfloat16(tiny: Path) -> None:
    """In the models' usual dtype: as near to diffusers in bfloat16 as that dtype allows, and no nearer to float32 than it."""
    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    texts = some_texts()
    expected = run_pipeline(pipeline, noise, [text.bfloat16() for text in texts[0]], 20, (5.0, 5.0))
    case: dict[str, Any] = dict(latents_num=5, num_per_block=5, num_cat=1, steps=20, texts=texts, noise=[noise])
    found = joined(denoise_in_threads(tiny, dtype="bfloat16", **case))
    exact = joined(denoise_in_threads(tiny, **case))
    assert expected.dtype == found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.01
    assert (found - expected).abs().max() < 0.1
    assert (found - exact).abs().mean() < 0.02
