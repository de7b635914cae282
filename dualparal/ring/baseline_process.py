"""The worker of a comparison: diffusers' own `WanPipeline`, whole video at once on one device, from the same request and into
the same files.

It takes one job from its queue and ends after it. A request that fits in the first block starts from the very noise the engine
would draw and gives the same video; a longer one draws as much noise as it has latents. Nothing is split here, so memory grows
with the length.
"""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from dualparal.events import BlockReady, Progress, Started
from dualparal.logs import working_on
from dualparal.media.writer import VideoWriter
from dualparal.messages import Denoised, Ready, RunJob, VideoClosed, WorkerOptions
from dualparal.method.noise import coordinated_noise
from dualparal.method.rules import plan_of
from dualparal.method.sampler import scheduler_of
from dualparal.model.checkpoint import DTYPES, load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.model.weights import load_text_encoder, load_vae
from dualparal.request import Settings
from dualparal.ring.worker import Uplink, quiet_libraries, run_worker, working_at


def baseline_main(connection: Connection, options: WorkerOptions, requests: Queue[Any]) -> None:
    """Entry point of the worker's process."""

    def serve(uplink: Uplink) -> None:
        quiet_libraries()
        torch.set_num_threads(options.engine.threads or 1)
        job = requests.get()
        assert isinstance(job, RunJob)
        working_on(job.job_id)
        run_baseline(job, options, uplink)

    run_worker("baseline", connection, options, serve)


def run_baseline(job: RunJob, options: WorkerOptions, uplink: Uplink) -> torch.Tensor:
    """Make the video of `job`, telling of it as ranks and codec do; returns the latents [1, C, F, h, w] float32 on the CPU.

    A text encoder that is not kept moves each part of the model to a GPU only while it works. Raises what stops it.
    """
    request, device, started_s = job.request, torch.device(options.devices[0]), time.monotonic()
    num_frames, num_steps = request.num_frames, request.num_inference_steps
    uplink.send(Started(job_id=job.job_id, num_blocks=1, num_items=num_steps, num_frames=num_frames))
    pipeline = load_pipeline(Path(options.folder), str(options.engine.dtype), str(options.engine.vae_dtype), request)
    if device.type == "cuda" and options.engine.text_encoder != "keep":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    loaded_s = time.monotonic()
    uplink.send(Ready(uplink.name, {"pid": os.getpid(), "load_s": loaded_s - started_s}))
    vae = pipeline.vae
    working_at("encoding the prompt and step 0")
    latents: torch.Tensor = pipeline(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_frames=num_frames, num_inference_steps=num_steps, guidance_scale=request.guidance_scale,
        guidance_scale_2=request.guidance_scale_2 if pipeline.transformer_2 is not None else None,
        latents=initial_noise(request, vae.config.z_dim, vae.config.scale_factor_spatial).to(device),
        output_type="latent", callback_on_step_end=_report(job.job_id, num_steps, uplink),
    ).frames.float().cpu()  # fmt: skip
    denoised_s = time.monotonic()
    decoder = StreamingDecoder(vae.to(device).requires_grad_(False).eval())
    decoder.on_frame = lambda: working_at("decoding")
    frames = to_uint8(decoder.decode(latents)).numpy()
    decoded_s = time.monotonic()
    working_at("writing the video")
    writer = VideoWriter(
        Path(job.folder), width=request.width, height=request.height, fps=request.fps, export_images=job.export_images
    )
    segment = writer.add_block(frames)
    uplink.send(
        BlockReady(
            job_id=job.job_id, block=0, path=str(segment.path), first_frame=0, num_frames=segment.num_frames,
            duration_s=segment.duration_s, checksum=segment.checksum,
        )
    )  # fmt: skip
    path, ended_s = writer.finish(request.to_json()), time.monotonic()
    working_at(None)
    timings = {
        "load_s": loaded_s - started_s, "denoise_s": denoised_s - loaded_s, "decode_s": decoded_s - denoised_s,
        "encode_s": ended_s - decoded_s,
    }  # fmt: skip
    uplink.send(Denoised(job.job_id))
    uplink.send(VideoClosed(job.job_id, False, str(path), segment.num_frames, timings, None))
    return latents


def load_pipeline(model: Path, dtype: str, vae_dtype: str, request: Settings) -> WanPipeline:
    """diffusers' pipeline on the CPU with the request's flow shift and switch between experts.

    Parts with scales, which diffusers would leave out, are loaded as the engine does.
    """
    checkpoint, parts = Checkpoint(model), dict[str, Any]()
    if _is_scaled(checkpoint, "vae"):
        parts["vae"] = load_vae(checkpoint, DTYPES[vae_dtype])
    else:
        parts["vae"] = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=DTYPES[vae_dtype])
    if _is_scaled(checkpoint, "text_encoder"):
        parts["text_encoder"] = load_text_encoder(checkpoint, DTYPES[dtype])
    for name in checkpoint.transformers:
        if _is_scaled(checkpoint, name):
            layers = range(checkpoint.num_layers)
            parts[name] = load_transformer_share(checkpoint, name, layers, dtype=DTYPES[dtype], device=torch.device("cpu"))
    pipeline = WanPipeline.from_pretrained(model, **parts, dtype=DTYPES[dtype])
    pipeline.scheduler = scheduler_of(request.solver, pipeline.scheduler.config, request.flow_shift)
    if request.boundary_ratio is not None:
        pipeline.register_to_config(boundary_ratio=request.boundary_ratio)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipeline


def _is_scaled(checkpoint: Checkpoint, part: str) -> bool:
    return any(tensor.scale for tensor in checkpoint.tensors(part).values())


def initial_noise(request: Settings, channels: int, scale: int) -> torch.Tensor:
    """[1, C, F, h, w] float32: the engine's own when one block holds the video, else as much fresh noise."""
    plan, size = plan_of(request), (request.height // scale, request.width // scale)
    if plan.num_blocks == 1:
        return next(
            coordinated_noise(plan, request.num_per_block, request.seed, channels=channels, height=size[0], width=size[1])
        )
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn(1, channels, request.latents_num, *size, generator=generator)


def _report(job_id: str, num_steps: int, uplink: Uplink) -> Any:
    def report(pipeline: WanPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        working_at(f"step {step + 1}")
        done = step + 1
        uplink.send(Progress(job_id=job_id, items_done=done, num_items=num_steps, num_steps=num_steps, block_steps=(done,)))
        return values

    return report
