"""What it costs that things wait in host memory: left caches (`--offload_cache`) and layers (`--offload`), per block step.

    python -m benchmarks.offload [--device cuda] [--layers 4] [--size 64]

Layers of the 1.3B model's shape with random weights, blocks of 8 latents with 8 of context, `context="cached"`, guidance on, in
turn with and without. On a CPU host memory is device memory: K and V are copied once when left and once when used, behind no
work; layers, which diffusers' hooks find where they are, are copied by the benchmark, once per block step. Both are the most
that copies at the speed of memory can cost. On a GPU copies have streams of their own; give a `--size` that fills it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import checkpoint, hardware, table
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Context, Item, Rules, Schedule, make_schedule
from dualparal.model.calibrate import link_rate
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import JobShape, Stage
from dualparal.planning.sizes import DTYPE_BYTES

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
    ways = {"at home": {}, "caches away": {"is_cache_offloaded": True}}
    if options.device != "cpu":
        ways["layers away"] = {"is_offloaded": True}
    stages = {way: _stage(folder, options, schedule, **named) for way, named in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for item in schedule.items:
        window = torch.randn(1, 4, sum(schedule.window_frames(item)), options.size // 8, options.size // 8)
        for way, stage in stages.items():
            seconds = _timed(stage, item, window)
            if item.left is Context.CACHE and item.keeps_tail and item.right is Context.CACHE and item.step:
                times[way].append(seconds)
    found = {way: sorted(seconds)[len(seconds) // 2] for way, seconds in times.items()}
    home = stages["at home"]
    if "layers away" not in found:
        found["layers away"] = found["at home"] + _copy_s(home)
    frame_bytes = 2 * home.tokens_per_frame * home.dim * DTYPE_BYTES[options.dtype]  # K and V
    moved = 2 * NUM_CAT * 2 * frame_bytes * options.layers  # guidance halves, both ways
    rate = link_rate(torch.device(options.device))
    rows = [
        [way, f"{seconds * 1e3:.1f}", f"{seconds / found['at home']:.3f}", f"{num_bytes / 1e6:.1f}"]
        for (way, seconds), num_bytes in zip(found.items(), (0, moved, _layer_bytes(home)), strict=True)
    ]
    print(table(["what waits in host memory", "ms per block step", "ratio", "MB moved per block step"], rows))
    link = f"{rate / 1e9:.1f} GB/s, the slower way" if rate else "none"
    print(
        f"\n{options.dtype}, {options.layers} layers, {options.size} pixels, {len(times['at home'])} block steps; link: {link}"
    )


def _stage(folder: Path, options: argparse.Namespace, schedule: Schedule, **named: bool) -> Stage:
    stage = Stage(
        Checkpoint(folder), range(options.layers), dtype=options.dtype, device=options.device, **named,
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


def _layer_bytes(stage: Stage) -> int:
    return sum(x.nbytes for x in stage.models[0].blocks.parameters())


def _copy_s(stage: Stage) -> float:
    """Median seconds to copy the weights of all layers once, into memory that is there."""
    weights = list(stage.models[0].blocks.parameters())
    copies = [torch.empty_like(x) for x in weights]
    found = []
    for _ in range(7):
        started_s = time.perf_counter()
        for x, copy in zip(weights, copies, strict=True):
            copy.copy_(x)
        found.append(time.perf_counter() - started_s)
    return sorted(found)[len(found) // 2]


def _wait(stage: Stage) -> None:
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)


if __name__ == "__main__":
    main()
