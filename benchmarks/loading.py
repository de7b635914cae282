"""Time to load and peak host memory of each rank at the real 1.3B shape, against `WanPipeline.from_pretrained` in the same run.

    python -m benchmarks.loading [--folder FOLDER] [--ranks 1,2,4]

Writes a synthetic checkpoint (float32 in two files, as on the hub: 5.7 GB) into the temporary folder and deletes it again.
Each load runs in a process of its own. "anonymous" is memory that cannot be dropped (weights, buffers), sampled every 5 ms,
less what the imports take; pages of the mapped files, which the kernel drops as it likes, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dualparal.model.layout import Checkpoint
from dualparal.model.part_shapes import transformer_shapes
from dualparal.planning.layer_split import split_layers
from dualparal.planning.sizes import WAN_1_3B, DiTSizes

CHUNK = os.urandom(1 << 24)


def write_checkpoint(folder: Path) -> Path:
    """A 1.3B transformer of random bytes in float32 (finite), the other parts tiny."""
    from dualparal.model.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder, num_layers=1)
    target = folder / "transformer"
    shutil.rmtree(target)
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **WAN_1_3B}))
    keys = list(transformer_shapes(WAN_1_3B).items())
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weight_map = {}
    for name, part in zip(names, (keys[: len(keys) // 2], keys[len(keys) // 2 :]), strict=True):
        _write_safetensors(target / name, dict(part))
        weight_map |= {key: name for key, _ in part}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        # The exponent's top byte is cleared in every number, so that none is infinite or not a number.
        chunk = bytearray(CHUNK)
        chunk[3::4] = bytes(len(chunk) // 4)
        while at:
            opened.write(memoryview(chunk)[: min(at, len(chunk))])
            at -= min(at, len(chunk))


def load_here(folder: Path, what: str) -> dict[str, float]:
    """Load one rank's share ("0-15") or everything by diffusers ("pipeline"), and say what it took."""
    import torch
    from diffusers import WanPipeline

    from benchmarks.common import PeakMemory
    from dualparal.model.stage import Stage

    torch.set_num_threads(1)
    started_s = time.perf_counter()
    with PeakMemory() as memory:
        if what == "pipeline":
            models = [WanPipeline.from_pretrained(folder, dtype=torch.bfloat16).transformer]
        else:
            start, stop = (int(number) for number in what.split("-"))
            models = Stage(Checkpoint(folder), range(start, stop), dtype="bfloat16", device="cpu").models
        seconds = time.perf_counter() - started_s
    held = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    return {"seconds": seconds, "peak": memory.grown_bytes, "held": held}


def _measure(folder: Path, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--folder", str(folder), "--load", what]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="write or find the checkpoint here, and leave it there")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, e.g. 1,2,4")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_here(options.folder, options.load)), flush=True)
        return
    from benchmarks.common import hardware, table

    own = Path(tempfile.mkdtemp(prefix="dualparal-loading-")) if options.folder is None else None
    folder = options.folder or own
    try:
        if not (folder / "model_index.json").is_file():
            if shutil.disk_usage(folder).free < 10e9:
                raise SystemExit("the synthetic checkpoint needs 6 GB of disk and some room; name another --folder")
            write_checkpoint(folder)
        rows = []
        tensor = max(4 * a * b for a, b in [(DiTSizes.of(WAN_1_3B).ffn_dim, DiTSizes.of(WAN_1_3B).dim)])
        for ranks in (int(number) for number in options.ranks.split(",")):
            for rank, layers in enumerate(split_layers(WAN_1_3B["num_layers"], ranks)):
                found = _measure(folder, f"{layers.start}-{layers.stop}")
                rows.append(_row(f"rank {rank} of {ranks}", found))
        rows.append(_row("WanPipeline.from_pretrained, transformer and tiny other parts", _measure(folder, "pipeline")))
        print(f"{hardware()}\n")
        print(table(("load to bfloat16 on the CPU", "seconds", "weights held, GB", "peak anonymous, GB", "peak / held"), rows))
        print(f"\nThe largest tensor is {tensor / 1e9:.3f} GB in float32.")
    finally:
        if own is not None:
            shutil.rmtree(own)


def _row(name: str, found: dict[str, float]) -> tuple[str, ...]:
    peak, held = found["peak"], found["held"]
    return name, f"{found['seconds']:.1f}", f"{held / 1e9:.3f}", f"{peak / 1e9:.3f}", f"{peak / held:.2f}"


if __name__ == "__main__":
    main()
