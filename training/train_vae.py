"""Train Pocket Wan's video autoencoder: `AutoencoderKLWan`, 8 x in space and 4 x in time, on clips of the procedural world.

Single frames first, then clips of 5, then of up to 17 frames (the autoencoder is causal and convolutional in time, so longer
videos need no longer clips); at the end the decoder alone, on the finished encoder's latents. Loss: L1 + squared error.
Prompts that are held out for evaluation are never drawn.

A learned posterior width drowned the signal at the start and most latents collapsed, so its two parts are fixed by hand:
latents get noise of a fixed small size while training (which keeps the latent space smooth), and a weak penalty keeps them
near unit size.

On longer clips the decoder is sometimes started in mid-clip: the transformer is trained on windows that may begin anywhere
in a video, so the latent it puts first may stand for four frames instead of one; the decoder then shows the last of the
four.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from dualparal.pocket.world import Prompt, held_out_prompts, random_scene, training_prompts
from training.checkpoints import Ema, TrainingLog, learning_rate, load_checkpoint, save_checkpoint
from training.full_sequence import decode_clip, encode_clip, use_full_sequence
from training.muon import build_optimizers

Z_DIM = 12
NOISE = 0.05
SIZE_WEIGHT = 1e-4
OBJECT_WEIGHT = 8.0
LATE_START_SHARE = 0.35


def build_vae(z_dim: int = Z_DIM) -> AutoencoderKLWan:
    """A small `AutoencoderKLWan`; 2 x 2 pixels enter as 12 channels, as in Wan2.2's, which quarters the cost."""
    return AutoencoderKLWan(
        base_dim=16, decoder_base_dim=16, z_dim=z_dim, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[True, True], in_channels=12, out_channels=12, patch_size=2,
        latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim, scale_factor_spatial=8, scale_factor_temporal=4,
    )  # fmt: skip


def to_tensor(videos: Sequence[np.ndarray]) -> torch.Tensor:
    """Rendered videos [frames, 64, 64, 3] in 0 .. 1 as [num_videos, 3, frames, 64, 64] in -1 .. 1."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def sample_clips(prompts: Sequence[Prompt], num_clips: int, num_frames: int, rng: np.random.Generator) -> torch.Tensor:
    """Random scenes of random prompts as [num_clips, 3, num_frames, 64, 64] in -1 .. 1."""
    chosen = rng.integers(len(prompts), size=num_clips)
    return to_tensor([random_scene(prompts[i], rng).render(num_frames) for i in chosen])


def object_weights(clips: torch.Tensor) -> torch.Tensor:
    """`OBJECT_WEIGHT` at the object and 3 pixels around it, 1 elsewhere.

    An object covers a tenth of the picture and would be learned last; the rim must weigh as much as the object, or corners
    are rounded outwards.
    """
    background = clips.flatten(2).median(dim=2).values[:, :, None, None, None]
    is_object = ((clips - background).abs().amax(dim=1) > 0.05).float()  # [b, t, h, w]
    near_object = torch.nn.functional.max_pool2d(is_object, 7, stride=1, padding=3)
    return 1 + (OBJECT_WEIGHT - 1) * near_object[:, None]


def psnr_db(vae: AutoencoderKLWan, *, num_clips: int = 8, num_frames: int = 33, seed: int = 7) -> float:
    """Mean over held-out clips of each clip's PSNR, in decibels."""
    clips = sample_clips(held_out_prompts(), num_clips, num_frames, np.random.default_rng(seed))
    with torch.no_grad():
        decoded = decode_clip(vae, encode_clip(vae, clips)[0]).clamp(-1, 1)
    squared = ((decoded - clips) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10 * squared.log10()).mean())


@dataclass(frozen=True)
class Phase:
    """A run over `stages`, each (steps, clips a step, lengths in frames to draw from), under one learning-rate curve.

    `key` keeps its random draws apart from other phases'.
    """

    name: str
    key: int
    stages: tuple[tuple[int, int, tuple[int, ...]], ...]
    peak_learning_rate: float
    trains_encoder: bool

    @property
    def num_steps(self) -> int:
        return sum(stage[0] for stage in self.stages)

    def stage_of(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Clips a step and their possible lengths at that step."""
        for num_steps, num_clips, lengths in self.stages:
            if step < num_steps:
                return num_clips, lengths
            step -= num_steps
        return self.stages[-1][1:]


BOTH = Phase(
    "vae",
    1,
    ((250, 16, (1,)), (250, 8, (5,)), (700, 4, (9, 17)), (700, 4, (5, 5, 9, 9, 17))),
    peak_learning_rate=1.5e-3,
    trains_encoder=True,
)
# Corners are learned last: a second cycle for both parts, then the decoder alone, while the transformer is trained already.
AGAIN = Phase("vae_again", 6, ((2600, 4, (5, 9, 9, 17)),), peak_learning_rate=1e-3, trains_encoder=True)
DECODER = Phase("decoder", 4, ((1500, 4, (5, 9, 9, 17)),), peak_learning_rate=7e-4, trains_encoder=False)


def reconstruction_loss(
    vae: AutoencoderKLWan, clips: torch.Tensor, rng: np.random.Generator, trains_encoder: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one step, and figures for the log."""
    with torch.set_grad_enabled(trains_encoder):
        mean, logvar = encode_clip(vae, clips)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    start = 0  # the latent the decoder begins with; latent k ends with frame 4k
    if mean.shape[2] > 2 and rng.uniform() < LATE_START_SHARE:
        start = int(rng.integers(1, mean.shape[2] - 1))
    error = decode_clip(vae, (mean + NOISE * noise)[:, :, start:]) - clips[:, :, 4 * start :]
    reported = (logvar - 2 * math.log(NOISE)).square().mean()  # the posterior is to say the noise it was trained with
    weights = object_weights(clips)[:, :, 4 * start :]
    loss = (weights * (error.abs() + error.square())).mean() + SIZE_WEIGHT * (mean.square().mean() + reported)
    figures = {"loss": loss.item(), "mse": error.square().mean().item(), "latent_std": mean.std().item()}
    return loss, {name: round(value, 5) for name, value in figures.items()}


def run_phase(phase: Phase, vae: AutoencoderKLWan, work: Path, seed: int) -> AutoencoderKLWan:
    """Run a phase from its last checkpoint in `work`, or from its start; `vae` ends with the averaged weights."""
    part = vae if phase.trains_encoder else nn.ModuleList([vae.post_quant_conv, vae.decoder])
    optimizers = build_optimizers(part, phase.peak_learning_rate)
    ema = Ema(vae, 0.998)
    log = TrainingLog(work / f"{phase.name}.jsonl")
    prompts = training_prompts()
    first = 0
    if state := load_checkpoint(work / f"{phase.name}.pt"):
        vae.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.shadow, ema.step, first = state["ema"], state["step"], state["step"]
    for step in range(first, phase.num_steps):
        rng = np.random.default_rng((seed, phase.key, step))
        num_clips, lengths = phase.stage_of(step)
        clips = sample_clips(prompts, num_clips, int(rng.choice(lengths)), rng)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, phase.num_steps, peak=phase.peak_learning_rate, warm_up=50)
        loss, figures = reconstruction_loss(vae, clips, rng, phase.trains_encoder)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(vae)
        done = step + 1
        if done % 50 == 0:
            log.write(step=done, **figures)
        if done % 100 == 0 or done == phase.num_steps:
            with ema.applied(vae):
                log.write(step=done, held_out_psnr_db=round(psnr_db(vae), 2))
            save_checkpoint(
                work / f"{phase.name}.pt",
                {
                    "model": vae.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "ema": ema.shadow,
                    "step": done,
                },
            )
    vae.load_state_dict(ema.shadow, strict=False)
    return vae


def set_latent_statistics(vae: AutoencoderKLWan, *, num_clips: int = 64, num_frames: int = 33, seed: int = 5) -> None:
    """Measure each latent channel's mean and deviation on training clips and write them into the config."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        latents = torch.cat(
            [encode_clip(vae, sample_clips(training_prompts(), 4, num_frames, rng))[0] for _ in range(num_clips // 4)]
        )
    vae.register_to_config(
        latents_mean=[round(x, 4) for x in latents.mean(dim=(0, 2, 3, 4)).tolist()],
        latents_std=[round(x, 4) for x in latents.std(dim=(0, 2, 3, 4)).tolist()],
    )


def train(work: Path, seed: int = 0, phases: Sequence[Phase] = (BOTH, AGAIN, DECODER)) -> AutoencoderKLWan:
    """Train from the last checkpoint in `work`, or from scratch; returns the averaged model, latent statistics measured.

    The encoder is final after the second phase and saved to `<work>/encoder`, the whole to `<work>/vae`: the transformer may
    be trained on the former while the decoder is still at work.
    """
    torch.manual_seed(seed)
    vae = use_full_sequence(build_vae())
    for phase in phases:
        run_phase(phase, vae, work, seed)
        if phase.trains_encoder:
            set_latent_statistics(vae)
        vae.save_pretrained(work / ("encoder" if phase.trains_encoder else "vae"))
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.work, args.seed)


if __name__ == "__main__":
    main()
