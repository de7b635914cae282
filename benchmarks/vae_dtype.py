"""What a VAE in bfloat16 costs against float32, in decibels, through the streaming decoder.

    python -m benchmarks.vae_dtype FOLDER [--clips 8] [--frames 33] [--scale 1] [--device cpu]

FOLDER holds an `AutoencoderKLWan` (config.json and its weights), or a whole checkpoint with a `vae` in it. Clips of the pocket
model's world that its training never drew are encoded in float32, normalised as the DiT makes latents, and decoded in each
dtype. PSNR is of 8-bit frames, mean over clips: against the clip itself, and against the frames of the float32 decode.
`--scale` repeats pixels, for VAEs made for larger pictures than 64 x 64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks.common import hardware, table
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.pocket.world import held_out_prompts
from training.train_vae import sample_clips

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def psnr_db(frames: torch.Tensor, truth: torch.Tensor) -> float:
    """Of uint8 frames [F, H, W, 3], in decibels; infinite for equal ones."""
    squared = ((frames.float() - truth.float()) / 255).square().mean()
    return float(-10 * squared.log10())


@torch.inference_mode()
def normalised_latents(vae: AutoencoderKLWan, clip: torch.Tensor) -> torch.Tensor:
    """Latents [1, z, 1 + k, h/8, w/8] of one clip [1, 3, 1 + 4k, h, w] in -1 .. 1, as the DiT makes them."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(clip.to(vae.device)).latent_dist.mode().cpu() - mean) / std


def measure(folder: Path, *, num_clips: int, num_frames: int, scale: int, device: str) -> dict[str, tuple[float, ...]]:
    """Per dtype: PSNR against the clips, PSNR against float32's frames, share of 8-bit values that differ, seconds a clip."""
    vae = AutoencoderKLWan.from_pretrained(folder).to(device).requires_grad_(False).eval()
    clips = sample_clips(held_out_prompts(), num_clips, num_frames, np.random.default_rng(7))
    clips = clips.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    latents = [normalised_latents(vae, clip[None]) for clip in clips]
    decoded: dict[str, list[torch.Tensor]] = {}
    seconds = {}
    for name, dtype in DTYPES.items():
        decoder = StreamingDecoder(vae.to(dtype))
        started_s = time.perf_counter()
        for one in latents:
            decoder.begin()
            decoded.setdefault(name, []).append(to_uint8(decoder.decode(one)))
        seconds[name] = (time.perf_counter() - started_s) / num_clips
    truth = [to_uint8(clip[None]) for clip in clips]
    exact = decoded["float32"]
    return {
        name: (
            float(np.mean([psnr_db(*pair) for pair in zip(found, truth, strict=True)])),
            float(np.mean([psnr_db(*pair) for pair in zip(found, exact, strict=True)])),
            float(np.mean([(a != b).float().mean() for a, b in zip(found, exact, strict=True)])),
            seconds[name],
        )
        for name, found in decoded.items()
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=33, help="4k + 1")
    parser.add_argument("--scale", type=int, default=1, help="pixels repeated this often in height and width")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    folder = options.folder / "vae" if (options.folder / "vae").is_dir() else options.folder
    before = hardware()
    found = measure(folder, num_clips=options.clips, num_frames=options.frames, scale=options.scale, device=options.device)
    rows = [
        (name, f"{psnr:.3f}", "-" if name == "float32" else f"{to_exact:.2f}", f"{differs:.1%}", f"{each_s:.2f}")
        for name, (psnr, to_exact, differs, each_s) in found.items()
    ]
    print(f"{before}\n")
    print(
        table(
            ("decode in", "PSNR to the clip, dB", "PSNR to float32's frames, dB", "8-bit values that differ", "s a clip"), rows
        )
    )


if __name__ == "__main__":
    main()
