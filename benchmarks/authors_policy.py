"""The authors' policy, restated and run: N ranks in the paper's order, each with the whole pipeline, one decode at the end.

Restated, after the paper and what their release is seen to do: every rank loads all of `WanPipeline` (all
layers, VAE, text encoder) and keeps it; every rank encodes the text; blocks go through the ranks in `paper` order; rank 0
decodes the whole video in one pass when the last block is done, and writes it. So the first frames come with the last.

Not restated: their code (the loops, edges and sampler here are this project's), the numbers their sampler and drain get wrong,
and bfloat16 timesteps; none of these changes time or memory much. Their release needs two devices; this runs on one as well.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import watched_processes
from dualparal import Settings


def one_rank(rank: int, ranks: int, port: int, folder: Path, request: Settings, line: Any) -> None:
    """One of their processes: load everything, say so, wait for the word, make the video; rank 0 tells how it went."""
    import torch
    import torch.distributed as dist
    from diffusers import WanPipeline

    from dualparal.method.grid import Grid
    from dualparal.method.noise import coordinated_noise
    from dualparal.method.rules import plan_of, rules_of
    from dualparal.method.sampler import SamplerFactory
    from dualparal.method.schedule import make_schedule
    from dualparal.model.layout import Checkpoint
    from dualparal.model.stage import JobShape, Stage
    from dualparal.planning.layer_split import split_layers
    from dualparal.ring.denoiser import Denoiser
    from dualparal.ring.stage_loop import SpanLog, run_stage
    from dualparal.ring.transport import DistributedLinks, Links, SoloLinks

    torch.set_num_threads(1)
    pipeline = WanPipeline.from_pretrained(folder)
    checkpoint = Checkpoint(folder)
    stage = Stage(checkpoint, split_layers(checkpoint.num_layers, ranks)[rank], dtype="float32", device="cpu")
    for name, parameter in stage.models[0].named_parameters():
        parameter.data = pipeline.transformer.get_parameter(name).data  # held once: the whole model has them
    links: Links = SoloLinks()
    if ranks > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        links = DistributedLinks(rank, Grid(ranks), device=torch.device("cpu"), timeout_s=3600, key=b"benchmark")
    line.send("loaded")
    line.recv()

    started_s = time.monotonic()
    with torch.inference_mode():
        texts = pipeline.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=512)
    plan = plan_of(request)
    schedule = make_schedule(rules_of(request), plan, (0,) * request.num_inference_steps)
    samplers = SamplerFactory(
        checkpoint.config("scheduler"), num_steps=request.num_inference_steps, flow_shift=request.flow_shift, device="cpu"
    )
    height, width = request.height // 8, request.width // 8
    shape = JobShape(height, width, 2, (request.guidance_scale,) * 2, (0,) * plan.num_blocks)
    conditions = links.broadcast(None if rank else stage.embed_conditions(samplers.timesteps, [texts]))
    stage.begin(shape, schedule, conditions)
    spans = SpanLog(f"stage {rank}", lambda _: None)
    if rank:
        run_stage(stage, links, schedule, spans)
        line.recv()  # the others stay, with all they hold, until the video is written
        return
    blocks: list[torch.Tensor] = []
    noise = coordinated_noise(plan, request.num_per_block, request.seed, channels=stage.channels, height=height, width=width)
    denoiser = Denoiser(
        stage, links, schedule, samplers, noise, is_stopped=lambda: False, on_step=lambda item: None,
        on_block=lambda block, latents: blocks.append(latents), spans=spans,
    )  # fmt: skip
    denoiser.run()
    denoised_s = time.monotonic()
    num_frames = write_at_once(pipeline, torch.cat(blocks, dim=2), request)
    ended_s = time.monotonic()
    line.send({"total": ended_s - started_s, "decode": ended_s - denoised_s, "frames": num_frames})
    line.recv()


def write_at_once(pipeline: Any, latents: Any, request: Settings) -> int:
    """Decode the whole video in one pass, as `WanPipeline` does, and write it; returns its frames."""
    import torch

    from dualparal.media.writer import VideoWriter
    from dualparal.model.vae import to_uint8

    vae = pipeline.vae
    with torch.inference_mode():
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        frames = to_uint8(vae.decode(latents * std + mean, return_dict=False)[0]).numpy()
    with tempfile.TemporaryDirectory() as outputs:
        writer = VideoWriter(Path(outputs), width=request.width, height=request.height, fps=request.fps)
        writer.add_block(frames)
        writer.finish(request.to_json())
    return len(frames)


def measure_authors(folder: Path, request: Settings, ranks: int) -> dict[str, float]:
    """Seconds from the word to the written video ("total"; its first frames come no sooner), of "decode", "frames", and the
    sum of the ranks' peak resident MiB ("memory") of a resolved `request`."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    for rank in range(ranks):
        here, there = context.Pipe()
        process = context.Process(target=one_rank, args=(rank, ranks, store.port, folder, request, there), daemon=True)
        process.start()
        there.close()
        lines.append(here)
        processes.append(process)
    for line in lines:
        assert line.recv() == "loaded"
    pids = {f"rank {rank}": process.pid for rank, process in enumerate(processes) if process.pid is not None}
    with watched_processes(pids) as peaks:
        for line in lines:
            line.send("go")
        found: dict[str, float] = lines[0].recv()
    for line in lines:
        line.send("done")
    for process in processes:
        process.join()
    return {**found, "memory": sum(peaks.values())}
