"""Streamed frames, put together, equal the one-shot decode bit for bit; pixels are rounded as diffusers rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.video_processor import VideoProcessor

from dualparal.errors import CheckpointError
from dualparal.model.layout import Checkpoint
from dualparal.model.vae import StreamingDecoder, to_uint8


def small_vae(*, patch_size: int | None = None, is_residual: bool = False) -> AutoencoderKLWan:
    """A random VAE; `patch_size` 2 and `is_residual` are Wan2.2-TI2V's kind."""
    pixels = 3 * (patch_size or 1) ** 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.3, 1.0], patch_size=patch_size, is_residual=is_residual, in_channels=pixels,
            out_channels=pixels, scale_factor_spatial=8 * (patch_size or 1),
        )  # fmt: skip
    return vae.eval().requires_grad_(False)


def one_shot(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """De-normalised and decoded at once, as WanPipeline does it."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        return vae.decode(latents / inverse_std + mean, return_dict=False)[0]


def streamed(decoder: StreamingDecoder, latents: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
    assert sum(chunks) == latents.shape[2]
    return torch.cat([decoder.decode(piece) for piece in latents.split(list(chunks), dim=2)], dim=2)


def some_latents(num_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, num_frames, 4, 6, generator=torch.Generator().manual_seed(seed))


KINDS = [{}, {"patch_size": 2}, {"patch_size": 2, "is_residual": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [1, 6], [6, 1], [3, 2, 2], [2, 1, 4]])
def test_any_chunking_has_the_bits_of_one_decode(kind: dict[str, bool], chunks: list[int]) -> None:
    vae = small_vae(**kind)  # type: ignore[arg-type]
    latents = some_latents(7)
    expected = one_shot(vae, latents)
    assert expected.std() > 0.01 and (expected.abs() < 1).float().mean() > 0.5, "a saturated picture would hide faults"
    decoder = StreamingDecoder(vae)
    assert torch.equal(streamed(decoder, latents, chunks), expected)
    assert expected.shape[2] == 25


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_short_videos(num_frames: int) -> None:
    vae, latents = small_vae(), some_latents(num_frames)
    expected = one_shot(vae, latents)
    assert torch.equal(streamed(StreamingDecoder(vae), latents, [1] * num_frames), expected)
    assert expected.shape[2] == (num_frames - 1) * 4 + 1


def test_a_second_video_knows_nothing_of_the_first() -> None:
    vae = small_vae()
    expected = one_shot(vae, some_latents(5, seed=1))
    decoder = StreamingDecoder(vae)
    streamed(decoder, some_latents(4), [3, 1])
    decoder.begin()
    assert torch.equal(streamed(decoder, some_latents(5, seed=1), [2, 3]), expected)
    decoder.begin()
    decoder.begin()
    assert torch.equal(streamed(decoder, some_latents(5, seed=1), [5]), expected)


def test_blocks_decoded_alone_would_differ() -> None:
    vae, latents = small_vae(), some_latents(6)
    alone = torch.cat([one_shot(vae, piece) for piece in latents.split(3, dim=2)], dim=2)
    assert alone.shape[2] == one_shot(vae, latents).shape[2] - 3


def test_equals_what_the_pipeline_shows(tiny: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    texts = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))
    noise = some_latents(3)

    def run(output_type: str) -> torch.Tensor:
        return pipeline(
            prompt_embeds=texts, height=32, width=48, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
            latents=noise.clone(), output_type=output_type,
        ).frames  # fmt: skip

    latents, shown = run("latent"), np.asarray(run("np"))
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    frames = streamed(decoder, latents, [1, 2])
    assert np.array_equal((frames[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy(), shown[0])
    assert np.array_equal(to_uint8(frames).numpy(), (shown[0] * 255).round().astype("uint8"))


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    values = torch.linspace(-1.1, 1.1, 3 * 2 * 40 * 40).reshape(1, 3, 2, 40, 40)
    pictures = VideoProcessor(vae_scale_factor=8).postprocess_video(values, output_type="pil")[0]
    expected = np.stack([np.asarray(picture) for picture in pictures])
    found = to_uint8(values)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)
    assert found.is_contiguous()


def test_latents_are_not_changed(tiny: Path) -> None:
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    latents = some_latents(3)
    copy = latents.clone()
    decoder.decode(latents)
    assert torch.equal(latents, copy)


def test_a_lacking_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    lost = sorted(key for key in tensors if key.startswith("decoder"))[0]
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost):
        StreamingDecoder.load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize("num_frames", [1, 5, 13])
@pytest.mark.parametrize(("name", "factor"), [("tiny", 8), ("tiny_ti2v", 16)])
def test_a_picture_or_clip_is_encoded_as_diffusers_does_it_while_a_video_is_decoded(
    name: str, factor: int, num_frames: int, request: pytest.FixtureRequest
) -> None:
    decoder = StreamingDecoder.load(Checkpoint(request.getfixturevalue(name)), device="cpu")
    size = (num_frames, 4 * factor, 6 * factor, 3)
    clip = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    latents = torch.randn(1, decoder.z_dim, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    whole = decoder.decode(latents)
    decoder.begin()
    first = decoder.decode(latents[:, :, :2])
    found = decoder.encode_clip(clip) if num_frames > 1 else decoder.encode_picture(clip[0])
    assert torch.equal(torch.cat([first, decoder.decode(latents[:, :, 2:])], dim=2), whole), "the video did not go on"
    video = (clip.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        mode = decoder.vae.encode(video).latent_dist.mode()
    config = decoder.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    assert found.shape == (1, decoder.z_dim, (num_frames + 3) // 4, 4, 6) and (found - (mode - mean) / std).abs().max() < 1e-5
