"""The decoder at a cut: begun anew for every scene, or running on from the scene before.

    python -m benchmarks.scene_decode [--pairs 12] [--frames 33]

Pairs of clips of the pocket model's world that its training never drew, each encoded as a video of its own, as the DiT makes
scenes, and decoded one after the other both ways. The table has the PSNR of the second clip's frames against the clip, by
frames after the cut: begun anew its first latent frame gives one frame, running on four, of which the last is compared.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import hardware, table
from benchmarks.vae_dtype import normalised_latents, psnr_db
from dualparal.model.source import find_checkpoint
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.pocket.world import held_out_prompts
from training.train_vae import sample_clips

AFTER = (0, 1, 2, 4, 8, 16, 32)  # frames


def second_clip(decoder: StreamingDecoder, scenes: list[torch.Tensor], *, begins_anew: bool) -> torch.Tensor:
    """Frames [F, H, W, 3] uint8 of the second of two scenes, as many as it has alone."""
    decoder.begin()
    decoder.decode(scenes[0])
    if begins_anew:
        decoder.begin()
    return to_uint8(decoder.decode(scenes[1]))[-(4 * scenes[1].shape[2] - 3) :]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--frames", type=int, default=33, help="of a clip, 4k + 1")
    options = parser.parse_args(argv)
    decoder = StreamingDecoder.load(find_checkpoint("pocket"), device="cpu")
    rng = np.random.default_rng(0)
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(options.pairs):
        clips = sample_clips(held_out_prompts(), 2, options.frames, rng)
        scenes = [normalised_latents(decoder.vae, clip[None]) for clip in clips]
        truth = to_uint8(clips[1][None])
        for begins_anew, rows in found.items():
            frames = second_clip(decoder, scenes, begins_anew=begins_anew)
            rows.append([psnr_db(frames[at : at + 1], truth[at : at + 1]) for at in AFTER if at < options.frames])
    print(hardware(), f"{options.pairs} pairs of {options.frames} frames, dB", sep="\n")
    heads = ["frames after the cut", *(str(at) for at in AFTER if at < options.frames)]
    named = {"begun anew": found[True], "running on": found[False]}
    print(table(heads, [[name, *(f"{mean:.1f}" for mean in np.mean(rows, axis=0))] for name, rows in named.items()]))


if __name__ == "__main__":
    main()
