"""The memory plan against what a stage really holds, rank by rank, on the CPU.

    python -m benchmarks.plan_check [--dtype float32] [--ranks 2] [--quantization fp8]

A mid-size random model (8 layers of width 512), each rank in a process of its own with one thread, fed with activations of the
shapes its neighbours would send. Weights, text and feature cache are the bytes of the tensors that the stage holds; activations
are the most that tensors made inside one item take at once, less what the item leaves behind; "resident" is the
growth of the process's anonymous memory since its imports, which has the allocator's slack in it, against the sum of the plan.
Messages (an item's input among them) and the codec are not part of it: a stage knows neither.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import PeakMemory, hardware, table
from dualparal.method.rules import rules_of
from dualparal.method.schedule import Item, Schedule
from dualparal.model.layout import Checkpoint
from dualparal.model.low_memory import stored_bytes
from dualparal.model.stage import JobShape, Stage
from dualparal.model.tiny import write_tiny_checkpoint
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory import memory_plan, workload_of
from dualparal.request import Settings

SHAPE = {"num_layers": 8, "num_heads": 8, "head_dim": 64, "ffn_dim": 2048}
SIZE_PX = 96
TEXT_TOKENS = 512
KINDS = ("weights", "text", "feature_cache", "activations")
REQUEST = Settings(
    prompt="x", negative_prompt="", latents_num=16, height=SIZE_PX, width=SIZE_PX, fps=16, seed=0, num_inference_steps=3,
    guidance_scale=5.0, guidance_scale_2=5.0, flow_shift=3.0, num_per_block=4, num_cat=4, schedule="paper",
    context="recomputed",
)  # fmt: skip


class Alive(TorchDispatchMode):
    """Counts the bytes of storages made inside: `now` alive, and the `most` at once since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def measure_rank(folder: Path, rank: int, ranks: int, dtype: str, quantization: str | None) -> dict[str, int]:
    """Bytes by kind of one rank that walks the schedule of `REQUEST`."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(folder)
    schedule = _workload(checkpoint, ranks).schedule
    texts = [[torch.randn(1, TEXT_TOKENS, checkpoint.text_dim) for _ in range(2)]]
    timesteps = torch.linspace(999, 300, schedule.num_steps).long()
    # In a job rank 0 sends these.
    conditions = Stage(checkpoint, range(1), dtype=dtype, device="cpu").embed_conditions(timesteps, texts)
    gc.collect()
    layers = split_layers(checkpoint.num_layers, ranks)[rank]
    found = dict.fromkeys((*KINDS, "resident"), 0)
    alive = Alive()
    with PeakMemory() as memory:
        stage = Stage(checkpoint, layers, dtype=dtype, device="cpu", quantization=quantization)
        found["weights"] = sum(stored_bytes(model) for model in stage.models)
        shape = JobShape(SIZE_PX // 8, SIZE_PX // 8, 2, (5.0, 5.0), (0,) * schedule.plan.num_blocks)
        stage.begin(shape, schedule, conditions)
        for item in schedule.items:
            incoming = _incoming(stage, schedule, item)
            alive.most = before = alive.now
            kept = _cache_bytes(stage) + _text_bytes(stage)
            with alive:
                out = stage.run(item, incoming)
            left = max(0, _cache_bytes(stage) + _text_bytes(stage) - kept)
            found["activations"] = max(found["activations"], alive.most - before - left)
            found["feature_cache"] = max(found["feature_cache"], _cache_bytes(stage))
            del out, incoming
        found["text"] = _text_bytes(stage)
    found["resident"] = memory.grown_bytes
    return found


def _workload(checkpoint: Checkpoint, ranks: int) -> Any:
    layers = [len(stage) for stage in split_layers(checkpoint.num_layers, ranks)]
    return workload_of(REQUEST, checkpoint.config("transformer"), layers, rules=rules_of(REQUEST), text_tokens=TEXT_TOKENS)


def _incoming(stage: Stage, schedule: Schedule, item: Item) -> torch.Tensor:
    if stage.is_first:
        return torch.randn(1, stage.channels, sum(schedule.window_frames(item)), SIZE_PX // 8, SIZE_PX // 8)
    return torch.randn(stage.hidden_shape(item), dtype=stage.dtype)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _cache_bytes(stage: Stage) -> int:
    kept = [*stage._heads.values(), *stage._tails.values()]
    return _bytes(tensor for layers in kept for pair in layers.values() for tensor in pair)


def _text_bytes(stage: Stage) -> int:
    crosses = [cross for crosses in stage._crosses for cross in crosses]
    key_values = [t for cross in crosses for pairs in cross._key_values.values() for pair in pairs for t in pair]
    texts = [half for texts in stage._texts for halves in texts.values() for half in halves]
    return _bytes([*key_values, *texts, *(t for pair in stage._conditions for t in pair), stage._rope])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quantization", choices=("fp8", "int8"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        found = measure_rank(options.folder, options.rank, options.ranks, options.dtype, options.quantization)
        print(json.dumps(found), flush=True)
        return
    before, rows = hardware(), []
    with tempfile.TemporaryDirectory() as place:
        folder = write_tiny_checkpoint(Path(place), **SHAPE)
        plan = memory_plan(
            _workload(Checkpoint(folder), options.ranks), height=SIZE_PX, width=SIZE_PX, dtype=options.dtype, on_gpu=False,
            quantization=options.quantization,
        )  # fmt: skip
        for rank, planned in enumerate(plan.ranks):
            command = [
                sys.executable,
                "-m",
                "benchmarks.plan_check",
                *sys.argv[1:],
                "--folder",
                str(folder),
                "--rank",
                str(rank),
            ]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            found = json.loads(answer)
            sums = {**{kind: getattr(planned, kind) for kind in KINDS}}
            sums["resident"] = sum(sums.values())
            rows += [
                (rank, kind.replace("_", " "), f"{sums[kind] / 1e6:.2f}", f"{found[kind] / 1e6:.2f}",
                 f"{sums[kind] / found[kind]:.3f}" if found[kind] else "-")
                for kind in sums
            ]  # fmt: skip
    print(f"{before}\n")
    print(table(("rank", "kind", "plan, MB", "measured, MB", "plan / measured"), rows))


if __name__ == "__main__":
    main()
