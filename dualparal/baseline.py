"""The baseline: diffusers' own `WanPipeline`, whole video at once on one device, from the same request and into the same files.

`python -m dualparal generate --baseline wan` runs this module in a process of its own. A request that fits in the first block
starts from the very noise the engine would draw and gives the same video; a longer one draws as much noise as it has latents.
Nothing is split here, so memory grows with the length.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from dualparal.core.noise import coordinated_noise
from dualparal.core.rules import plan_of
from dualparal.errors import DualParalError
from dualparal.events import BlockReady, Event, Failed, Finished, Progress, Started
from dualparal.media.writer import VideoWriter
from dualparal.model.checkpoint import DTYPES
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.devices import use_pci_order
from dualparal.runtime.journal import JobFolder
from dualparal.runtime.worker import describe_error, quiet_libraries


def run_baseline(folder: JobFolder, *, device: str, text_encoder: str = "keep") -> torch.Tensor:
    """Make the video of a job folder and append its events; returns the latents [1, C, F, h, w] float32 on the CPU.

    The model, dtypes and request are those of `request.json`. `text_encoder` other than keep moves each part of the model to a
    GPU only while it works. Raises what stops it, after a `Failed` event.
    """
    record, request = folder.record(), folder.request()
    started_s = time.monotonic()
    try:
        return _run(folder, record, request, torch.device(device), text_encoder, started_s)
    except Exception as error:
        kind, message = describe_error("the baseline", error)
        folder.append(Failed(job_id=folder.job_id, kind=kind, message=message, path=None, num_frames=0))
        raise


def _run(
    folder: JobFolder,
    record: dict[str, Any],
    request: GenerationRequest,
    device: torch.device,
    text_encoder: str,
    started_s: float,
) -> torch.Tensor:
    assert request.latents_num and request.num_inference_steps and request.height and request.width and request.fps
    num_frames, num_steps = frames_of_latents(request.latents_num), request.num_inference_steps
    folder.append(Started(job_id=folder.job_id, num_blocks=1, num_items=num_steps, num_frames=num_frames))
    pipeline = load_pipeline(Path(record["model"]), record["dtype"], record.get("vae_dtype", "float32"), request)
    if device.type == "cuda" and text_encoder != "keep":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    loaded_s = time.monotonic()
    vae = pipeline.vae
    latents: torch.Tensor = pipeline(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height, width=request.width,
        num_frames=num_frames, num_inference_steps=num_steps, guidance_scale=request.guidance_scale,
        guidance_scale_2=request.guidance_scale_2 if pipeline.transformer_2 is not None else None,
        latents=initial_noise(request, vae.config.z_dim, vae.config.scale_factor_spatial).to(device),
        output_type="latent", callback_on_step_end=_report(folder, num_steps),
    ).frames.float().cpu()  # fmt: skip
    denoised_s = time.monotonic()
    frames = to_uint8(StreamingDecoder(vae.to(device).requires_grad_(False).eval()).decode(latents)).numpy()
    decoded_s = time.monotonic()
    writer = VideoWriter(
        folder.path,
        width=request.width,
        height=request.height,
        fps=request.fps,
        export_images=bool(record.get("export_images")),
    )
    segment = writer.add_block(frames)
    folder.append(
        BlockReady(
            job_id=folder.job_id, block=0, path=str(segment.path), first_frame=0, num_frames=segment.num_frames,
            duration_s=segment.duration_s,
        )
    )  # fmt: skip
    path, ended_s = writer.finish(request.to_json()), time.monotonic()
    timings = {
        "load_s": loaded_s - started_s, "denoise_s": denoised_s - loaded_s, "decode_s": decoded_s - denoised_s,
        "encode_s": ended_s - decoded_s, "first_frames_s": ended_s - started_s, "total_s": ended_s - started_s,
    }  # fmt: skip
    folder.append(Finished(job_id=folder.job_id, path=str(path), num_frames=segment.num_frames, timings=timings))
    return latents


def load_pipeline(model: Path, dtype: str, vae_dtype: str, request: GenerationRequest) -> WanPipeline:
    """diffusers' pipeline on the CPU with the request's flow shift and switch between experts."""
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=DTYPES[vae_dtype])
    pipeline = WanPipeline.from_pretrained(model, vae=vae, dtype=DTYPES[dtype])
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, flow_shift=request.flow_shift)
    if request.boundary_ratio is not None:
        pipeline.register_to_config(boundary_ratio=request.boundary_ratio)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipeline


def initial_noise(request: GenerationRequest, channels: int, scale: int) -> torch.Tensor:
    """[1, C, F, h, w] float32: the engine's own when one block holds the video, else as much fresh noise."""
    assert request.latents_num and request.height and request.width and request.seed is not None and request.num_per_block
    plan, size = plan_of(request), (request.height // scale, request.width // scale)
    if plan.num_blocks == 1:
        return next(
            coordinated_noise(plan, request.num_per_block, request.seed, channels=channels, height=size[0], width=size[1])
        )
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn(1, channels, request.latents_num, *size, generator=generator)


def _report(folder: JobFolder, num_steps: int) -> Any:
    def report(pipeline: WanPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        folder.append(
            Progress(
                job_id=folder.job_id, items_done=step + 1, num_items=num_steps, num_steps=num_steps, block_steps=(step + 1,)
            )
        )
        return values

    return report


class _Telling(JobFolder):
    """A job folder whose events are also told on stdout."""

    def append(self, event: Event) -> None:
        super().append(event)
        sys.stdout.write(json.dumps(event.to_json()) + "\n")
        sys.stdout.flush()


def _end_with_stdin() -> None:
    """Whoever started this process holds its stdin open for as long as it lives."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """The process that the command line starts."""
    parser = argparse.ArgumentParser(prog="python -m dualparal.baseline")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text_encoder", default="keep")
    parser.add_argument("--tell", action="store_true", help="events on stdout, one JSON object a line")
    parser.add_argument("--with_stdin", action="store_true", help="end when stdin is closed, as it is when its owner is killed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    quiet_libraries()
    use_pci_order()
    folder = _Telling(options.folder) if options.tell else JobFolder(options.folder)
    if options.with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        torch.set_num_threads(int(folder.record().get("threads") or torch.get_num_threads()))
        run_baseline(folder, device=options.device, text_encoder=options.text_encoder)
    except DualParalError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
