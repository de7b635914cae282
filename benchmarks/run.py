"""Every schedule against plain Wan and against the authors' policy, on a mid-size random model, in one run.

Baselines: (a) diffusers' `WanPipeline` in one pass over the same number of latents, with 1 and with as many threads as ranks;
(b) the authors' policy restated and run (`authors_policy.py`): the same `paper` order, but the whole pipeline loaded on every
rank and one decode at the end, so that its first frames are its last. Memory is the sum of the peak resident sets of an
engine's ranks and codec, of (b)'s ranks, of (a)'s process; loading is not in the times.

Few steps: 4 without guidance, Euler, with a LoRA of rank 32 beside every linear layer (random, as the model is), against
`WanPipeline` with the same LoRA, solver and steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.authors_policy import measure_authors
from benchmarks.common import checkpoint, hardware, table
from benchmarks.memory import watched
from dualparal import Engine, GenerationRequest

METHODS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, micro-batches": {"micro_batches": True},
    "paper, cached context": {"context": "cached"},
    "paper, step cache 2": {"cache_interval": 2},
    "paper, step cache 3": {"cache_interval": 3},
    "preview": {"schedule": "preview"},
    "preview, cached context": {"schedule": "preview", "context": "cached"},
}
FEW_STEPS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "euler"}
FEW_STEPS_ORDERS: dict[str, dict[str, Any]] = {
    "4 steps with a LoRA, paper": {},
    "4 steps with a LoRA, cached context": {"schedule": "preview", "context": "cached"},
}
RANK = 32


def random_lora(folder: Path) -> Path:
    """A LoRA beside every linear layer of the model's layers."""
    from diffusers import WanTransformer3DModel

    generator, state = torch.Generator().manual_seed(0), {}
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes = (RANK, module.in_features), (module.out_features, RANK)
            for part, shape in zip("AB", shapes, strict=True):
                state[f"transformer.blocks.{name}.lora_{part}.weight"] = 0.01 * torch.randn(shape, generator=generator)
    save_file(state, path := folder.parent / f"{folder.name}-lora.safetensors")
    return path


def plain_wan(folder: Path, request: GenerationRequest, threads: int, line: Any) -> None:
    """Run `WanPipeline` in this process and send (total seconds, peak MiB)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.set_num_threads(threads)
    pipeline = WanPipeline.from_pretrained(folder)
    for lora in request.loras or ():
        pipeline.load_lora_weights(lora)
    if request.solver == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    started_s = time.monotonic()
    pipeline(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_frames=4 * request.latents_num - 3, num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
    )  # fmt: skip
    line.send((time.monotonic() - started_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measure_plain(folder: Path, request: GenerationRequest, threads: int) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=plain_wan, args=(folder, request, threads, there))
    process.start()
    result: tuple[float, float] = here.recv()
    process.join()
    return result


def measure(engine: Engine, request: GenerationRequest) -> dict[str, float]:
    """One job: seconds to the first frames and in all, and peak MiB of all ranks and the codec."""
    with watched(engine) as peaks:
        timings = engine.submit(request).result().timings
    return {"first": timings["first_frames_s"], "total": timings["total_s"], "memory": sum(peaks.values())}


def few_steps(request: GenerationRequest, folder: Path) -> GenerationRequest:
    """The same video as few-step LoRAs make it."""
    return request.model_copy(update={**FEW_STEPS, "loras": (str(random_lora(folder)),)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    folder = checkpoint("mid", num_layers=8, num_heads=8, head_dim=32, ffn_dim=1024)
    request = GenerationRequest(
        prompt="benchmark", latents_num=4 * options.blocks + 4, num_per_block=4, num_cat=4,
        num_inference_steps=options.steps, height=128, width=128, seed=0, guidance_scale=5.0, negative_prompt="",
        schedule="paper", context="recomputed",
    )  # fmt: skip
    print(hardware(), f"{request.latents_num} latents, {options.steps} steps, one thread per rank", sep="\n")
    few, rows = few_steps(request, folder), []
    for name, asked in (("WanPipeline, one pass", request), ("4 steps with a LoRA, WanPipeline", few)):
        for threads in sorted({1, max(options.ranks)}):
            seconds, memory = measure_plain(folder, asked, threads)
            rows.append([name, f"{threads} threads", seconds, seconds, memory])
    for ranks in options.ranks:
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(folder, ranks=ranks, device="cpu", threads=1, outputs=outputs) as engine,
        ):
            engine.submit(request.model_copy(update={"latents_num": 4, "num_inference_steps": 1})).result()
            resolved = engine.resolve(request)
            wanted = {name: request.model_copy(update=changes) for name, changes in METHODS.items()}
            wanted |= {name: few.model_copy(update=changes) for name, changes in FEW_STEPS_ORDERS.items()}
            for name, asked in wanted.items():
                seen = measure(engine, asked)
                rows.append([name, f"{ranks} ranks", seen["first"], seen["total"], seen["memory"]])
        seen = measure_authors(folder, resolved, ranks)
        rows.append(["the authors' policy", f"{ranks} ranks", seen["total"], seen["total"], seen["memory"]])
    one = rows[0][3]
    authors = {row[1]: row[3] for row in rows if row[0] == "the authors' policy"}
    film_s, cells = (4 * request.latents_num - 3) / 16, []
    for name, where, first, total, memory in rows:
        sooner = f"{authors[where] / first:.1f}" if where in authors and "LoRA" not in name else ""
        speeds = [f"{film_s / total:.2f}", f"{one / total:.2f}", sooner]
        cells.append([name, where, f"{first:.1f}", f"{total:.1f}", *speeds, f"{memory:.0f}"])
    header = [
        "method",
        "on",
        "first frames s",
        "total s",
        "seconds of video a second",
        "times WanPipeline's speed",
        "first frames, times sooner",
        "peak MiB",
    ]
    print(table(header, cells))


if __name__ == "__main__":
    main()
