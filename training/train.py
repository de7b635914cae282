"""Retrain Pocket Wan from scratch: `python -m training.train --seed 0`.

Autoencoder first, then transformer and text encoder on its latents, then export. Killed and started again it goes on from
its last checkpoint. A little over three hours of one CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from training.export import export
from training.train_dit import NUM_STEPS, training_steps
from training.train_vae import train as train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("pocket_training"), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the finished checkpoint (default: <work>/weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if (args.work / "vae" / "config.json").exists():
        vae = AutoencoderKLWan.from_pretrained(args.work / "vae")
    else:
        vae = train_vae(args.work, args.seed)
    for done, model, ema in training_steps(args.work, vae, args.seed, NUM_STEPS):
        if done == NUM_STEPS:
            export(vae, model, ema, args.out or args.work / "weights")


if __name__ == "__main__":
    main()
