"""How many latent frames the decoder has to be primed with, so that a continuation's frames are those of one decode.

    python -m benchmarks.primed_decode [--clips 4] [--size 4] [--model pocket] [--encoder]

Of each clip the first latents are the film to be continued, the others the new part. One decode runs over all of them; the
primed one begins with the last P of the first part, whose frames it throws away. The table has the largest difference of
8-bit values over the new part, and the share of values that differ. The pocket VAE decodes clips of its world that its training
never drew; `--model wan` is `AutoencoderKLWan` of Wan2.1's size with random weights, over noise of `--size` squared latents.
`--encoder`: how many of the first latents of a clip have to be thrown away until the others are those of an encoder that has
seen more of it, by the largest difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks.common import hardware, table
from benchmarks.vae_dtype import normalised_latents
from dualparal.model.source import find_checkpoint
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.pocket.world import held_out_prompts
from training.train_vae import sample_clips

PRIMED = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 24)
BEFORE, AFTER = 28, 4  # latent frames
LAST = 8


def differences(decoder: StreamingDecoder, latents: torch.Tensor) -> dict[int, tuple[int, float]]:
    """By P: (largest difference of 8-bit values, share of values that differ) over the frames after the first `BEFORE`."""
    decoder.begin()
    decoder.decode(latents[:, :, :BEFORE])
    whole = to_uint8(decoder.decode(latents[:, :, BEFORE:])).int()
    found = {}
    for primed in PRIMED:
        decoder.begin()
        if primed:
            decoder.decode(latents[:, :, BEFORE - primed : BEFORE])
        frames = to_uint8(decoder.decode(latents[:, :, BEFORE:])).int()
        off = (frames - whole[-len(frames) :]).abs()
        found[primed] = int(off.max()), float((off > 0).float().mean())
    return found


def pocket_clips(decoder: StreamingDecoder, count: int) -> Iterator[torch.Tensor]:
    """Latents of clips [1, z, BEFORE + AFTER, h, w], normalised."""
    for clip in sample_clips(held_out_prompts(), count, 4 * (BEFORE + AFTER) - 3, np.random.default_rng(3)):
        yield normalised_latents(decoder.vae, clip[None])


def settling(decoder: StreamingDecoder, count: int) -> dict[int, float]:
    """By how many are thrown away: the largest difference of the `LAST` latents after them."""
    found: dict[int, float] = {}
    num_latents = PRIMED[-1] + LAST + 12
    for clip in sample_clips(held_out_prompts(), count, 4 * num_latents - 3, np.random.default_rng(3)):
        frames = to_uint8(clip[None])
        whole = decoder.encode_clip(frames)[:, :, -LAST:]
        for away in PRIMED:
            part = decoder.encode_clip(frames[-(4 * (away + LAST) - 3) :])[:, :, -LAST:]
            found[away] = max(found.get(away, 0.0), float((part - whole).abs().max()))
    return found


def noise(decoder: StreamingDecoder, count: int, size: int) -> Iterator[torch.Tensor]:
    """The same of Gaussian noise, frames that go on from each other as a film's do."""
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(1, decoder.z_dim, BEFORE + AFTER, size, size, generator=generator)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--size", type=int, default=4, help="of the random VAE's latents, in both directions")
    parser.add_argument("--model", choices=("pocket", "wan"), default="pocket")
    parser.add_argument("--encoder", action="store_true", help="the encoder of the pocket VAE instead")
    options = parser.parse_args(argv)
    if options.encoder:
        pocket = StreamingDecoder.load(find_checkpoint("pocket"), device="cpu")
        print(hardware(), f"{options.clips} clips", sep="\n")
        print(table(("latents thrown away", "largest difference"),
                    [(away, f"{most:.4f}") for away, most in settling(pocket, options.clips).items()]))  # fmt: skip
        return
    if options.model == "wan":
        torch.manual_seed(0)
        decoder = StreamingDecoder(AutoencoderKLWan().requires_grad_(False).eval())
        clips = noise(decoder, options.clips, options.size)
    else:
        decoder = StreamingDecoder.load(find_checkpoint("pocket"), device="cpu")
        clips = pocket_clips(decoder, options.clips)
    found = [differences(decoder, latents) for latents in clips]
    print(hardware(), f"{options.clips} clips, {BEFORE} latents before, {AFTER} after", sep="\n")
    worst = {primed: (max(one[primed][0] for one in found), max(one[primed][1] for one in found)) for primed in PRIMED}
    print(table(("latents primed with", "largest difference", "values that differ"),
                [(primed, most, f"{share:.2%}") for primed, (most, share) in worst.items()]))  # fmt: skip


if __name__ == "__main__":
    main()
