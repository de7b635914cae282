"""What it costs that left caches wait in host memory (`--offload_cache`): cached block steps with and without, in turn.

    python -m benchmarks.cache_offload [--device cuda] [--layers 4] [--size 64]

Layers of the 1.3B model's shape with random weights, blocks of 8 latents with 8 of context, guidance on. On a CPU host memory
is device memory: K and V are copied once when left and once when used, behind no work, the most that copies at the speed of
memory can cost. On a GPU the copies have streams of their own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import checkpoint, hardware, table
from dualparal.core.plan import BlockPlan
from dualparal.core.schedule import Context, Item, Rules, Schedule, make_schedule
from dualparal.core.sizes import DTYPE_BYTES
from dualparal.model.calibrate import link_rate
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import JobShape, Stage

NUM_BLOCKS, NUM_CAT, STEPS = 6, 8, 10


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware(), "\n")
    folder = checkpoint(f"wide-{options.layers}", num_layers=options.layers, num_heads=12, head_dim=128, ffn_dim=8960)
    schedule = make_schedule(Rules(context="cached"), BlockPlan.of(8 * NUM_BLOCKS, 8, NUM_CAT), (0,) * STEPS)
    stages = [_stage(folder, options, schedule, is_away=is_away) for is_away in (False, True)]
    times: dict[bool, list[float]] = {False: [], True: []}
    for item in schedule.items:
        window = torch.randn(1, 4, sum(schedule.window_frames(item)), options.size // 8, options.size // 8)
        for is_away, stage in zip((False, True), stages, strict=True):
            seconds = _timed(stage, item, window)
            if item.left is Context.CACHE and item.keeps_tail and item.right is Context.CACHE and item.step:
                times[is_away].append(seconds)
    here, away = (sorted(found)[len(found) // 2] for found in (times[False], times[True]))
    frame_bytes = 2 * stages[0].tokens_per_frame * stages[0].dim * DTYPE_BYTES[options.dtype]  # K and V
    moved = 2 * NUM_CAT * 2 * frame_bytes * options.layers  # guidance halves, both ways
    rate = link_rate(torch.device(options.device))
    rows = [
        ["ms per block step, caches on the device", f"{here * 1e3:.1f}"],
        ["ms per block step, caches in host memory", f"{away * 1e3:.1f}"],
        ["ratio", f"{away / here:.3f}"],
        ["K and V moved per block step, both ways, MB", f"{moved / 1e6:.1f}"],
        ["the link, slower way, GB/s", f"{rate / 1e9:.1f}" if rate else "not there"],
        ["block steps timed", len(times[True])],
    ]
    print(table(["what", options.dtype], rows))


def _stage(folder: Path, options: argparse.Namespace, schedule: Schedule, *, is_away: bool) -> Stage:
    stage = Stage(
        Checkpoint(folder), range(options.layers), dtype=options.dtype, device=options.device, is_cache_offloaded=is_away,
    )  # fmt: skip
    halves = [torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(half)) for half in range(2)]
    conditions = stage.embed_conditions(torch.linspace(999, 1, STEPS).long(), [halves])
    shape = JobShape(options.size // 8, options.size // 8, 2, (5.0, 5.0), (0,) * NUM_BLOCKS)
    stage.begin(shape, schedule, conditions)
    return stage


def _timed(stage: Stage, item: Item, window: torch.Tensor) -> float:
    _wait(stage)
    started_s = time.perf_counter()
    stage.run(item, window)
    _wait(stage)
    return time.perf_counter() - started_s


def _wait(stage: Stage) -> None:
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)


if __name__ == "__main__":
    main()
