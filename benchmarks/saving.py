"""What saving state at sweep borders costs: one save at real sizes, and its share of a job's time on this machine.

A job that denoises for `--seconds` offers a border to save at every sweep of `--sweep_s`; what `StateWriter` then spends is
set against the whole. The rest of the time stands for denoising, so the share is that of a thread beside it: an upper bound.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import hardware, table
from dualparal.runtime.state import StateWriter, SweepState, write_sweep

SAMPLER_TENSORS = 3  # two past predictions and the last sample
CASES = {  # name: (blocks in flight, latent frames of a block, latent height, latent width)
    "32x32, paper, 12 in flight": (12, 4, 4, 4),
    "480x832, preview, 3 in flight": (3, 8, 60, 104),
    "480x832, preview, 8 in flight": (8, 8, 60, 104),
    "480x832, paper, 50 in flight": (50, 8, 60, 104),
}


def border(num_blocks: int, num_frames: int, height: int, width: int) -> SweepState:
    """A state of the size it would have between two sweeps; neighbours' ends are half a block each."""

    def some(frames: int) -> torch.Tensor:
        return torch.randn(1, 16, frames, height, width)

    return SweepState(
        next_index=1,
        num_finished=0,
        latents={block: some(num_frames) for block in range(num_blocks)},
        counts={block: {"step": 1} for block in range(num_blocks)},
        samplers={block: {f"x{n}": some(num_frames) for n in range(SAMPLER_TENSORS)} for block in range(num_blocks)},
        tails={(block, 1): some(num_frames // 2) for block in range(num_blocks)},
    )


def share_of(state: SweepState, seconds: float, sweep_s: float, folder: Path) -> tuple[float, int]:
    """(share of the time spent saving, saves) of a job of `seconds` with a border every `sweep_s`."""
    writer, num_saved, started_s = StateWriter(folder), 0, time.monotonic()
    while time.monotonic() - started_s < seconds:
        if writer.wants_sweep():
            writer.save_sweep(state)
            num_saved += 1
        time.sleep(sweep_s)
    total_s = time.monotonic() - started_s
    writer.close()
    return writer.seconds / total_s, num_saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each make-believe job")
    parser.add_argument("--sweep_s", type=float, default=0.5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases, the smallest first")
    options = parser.parse_args()
    print(hardware(), flush=True)
    rows = []
    for name, shape in list(CASES.items())[: options.cases]:
        state = border(*shape)
        with tempfile.TemporaryDirectory() as folder:
            started_s = time.monotonic()
            write_sweep(Path(folder), state)
            save_s = time.monotonic() - started_s
            size = (Path(folder) / "sweep.safetensors").stat().st_size
            share, num_saved = share_of(state, options.seconds, options.sweep_s, Path(folder))
        rows.append([name, f"{size / 1e6:.1f}", f"{save_s:.3f}", num_saved, f"{100 * share:.2f} %"])
        print(rows[-1], flush=True)
    print(table(["state", "MB", "s per save", f"saves in {options.seconds:.0f} s", "share of the time"], rows))


if __name__ == "__main__":
    main()
