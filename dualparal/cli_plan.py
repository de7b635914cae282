"""`python -m dualparal plan`: what fits where, bytes per rank, times, and what to change when it does not fit.

Works before any download; with `--calibrate` it first measures this host's device (only then torch is imported).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dualparal.core.estimate import format_plan, gigabytes
from dualparal.core.job_plan import JobPlan, fastest_layers, plan_job, settle_text_encoder
from dualparal.core.placement import ModelSizes, Placement, Speed
from dualparal.core.proposals import Proposal, changes_in_words, propose
from dualparal.core.rules import settle_rules
from dualparal.core.schedule import Schedule
from dualparal.core.sizes import DiTSizes
from dualparal.errors import RequestError
from dualparal.model.known import find_sizes
from dualparal.model.layout import split_layers
from dualparal.presets import Preset, find_preset, load_presets
from dualparal.request import GenerationRequest
from dualparal.runtime.calibration import load_speed, store_speed
from dualparal.runtime.devices import bytes_per_device, count_gpus
from dualparal.runtime.engine_options import (
    AUTO_SPLIT,
    QUANTIZATIONS,
    TEXT_ENCODER_PLACES,
    check_offload,
    check_offload_cache,
    dtype_name,
    layer_counts,
)


def add_plan_command(commands: argparse._SubParsersAction, add_request_flags: Callable[..., None]) -> None:
    """Hook `plan` into the command line's parser; `add_request_flags` adds the flags of a video."""
    parser = commands.add_parser("plan", help="what a job needs and how long it takes, before any download")
    add_request_flags(parser, needs_prompt=False)
    devices = parser.add_argument_group("the devices")
    devices.add_argument("--model_id", metavar="MODEL", help="folder in diffusers' layout, hub id, or a preset's name")
    devices.add_argument("--preset", help="preset to take values (and, without --model_id, the model) from")
    devices.add_argument("--presets_folder", help="also read presets from here")
    devices.add_argument("--gpus", type=int, metavar="N", help="GPUs to plan for (default: those of this host)")
    devices.add_argument("--gpu_memory", type=float, metavar="GB", help="memory of each GPU in GB of 10^9 bytes")
    devices.add_argument("--ranks", type=int, metavar="N", help="ranks that share the layers (default: one for each GPU)")
    devices.add_argument("--layer_split", metavar="auto|N,N,...", help="layers per rank: the fastest, or these (default: even)")
    devices.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="plan for GPUs or for this CPU")
    devices.add_argument("--dtype", help="dtype of the DiT (default: the preset's on GPUs, float32 on the CPU)")
    add_low_memory_flags(devices.add_argument)
    devices.add_argument("--vae_dtype", help="dtype of the VAE (default: the preset's)")
    devices.add_argument("--text_encoder", choices=TEXT_ENCODER_PLACES, default="auto", help="where it is after encoding")
    speed = parser.add_argument_group("the times")
    speed.add_argument("--flops", type=float, metavar="TFLOPS", help="10^12 FLOP/s of one device, instead of a calibration")
    speed.add_argument("--calibrate", action="store_true", help="measure this host's device first, and remember it")
    parser.set_defaults(run=run_plan)


def add_low_memory_flags(add: Callable[..., Any]) -> None:
    """The flags that `generate`, `resume`, `serve` and `plan` share; `add` is a parser's or group's `add_argument`."""
    add("--quantization", choices=QUANTIZATIONS, help="8-bit weights of the layers (changes the numbers; int8 needs torchao)")
    add("--offload", action="store_true", help="layers wait in host memory and come to the GPU one by one")
    add(
        "--offload_cache",
        action="store_true",
        help="with --context cached, neighbours' K and V wait in host memory (GPUs only)",
    )


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; 0 when it fits, 1 when not."""
    presets = load_presets(options.presets_folder)
    name = options.model_id or options.preset or "pocket"
    preset = find_preset(options.preset or name, presets)
    model = find_sizes(name, preset)
    placement = _placement(options, preset, model)
    given = {field: getattr(options, field) for field in GenerationRequest.model_fields}
    asked = GenerationRequest(**{**{k: v for k, v in given.items() if v is not None}, "prompt": options.prompt or ""})
    request, usual = (
        settle_rules(wanted.resolve(preset, num_experts=model.num_experts), len(placement.layers))
        for wanted in (asked, GenerationRequest(prompt=""))
    )
    placement = settle_text_encoder(usual, model, placement)  # as an engine does
    speed, source = _speed(options, request, model, placement)
    split = ""
    if options.layer_split == AUTO_SPLIT:
        placement = replace(placement, layers=fastest_layers(request, model, placement, speed))
        split = f" (the fastest by {'measured times' if speed and options.flops is None else 'FLOPs'})"
    plan = plan_job(request, model, placement, speed=speed)
    print(describe(plan, source, split))
    if plan.refusal is None:
        return 0
    print(f"\nIt does not fit: {plan.refusal}.")
    proposals = propose(request, model, placement, speed)
    way_out = "use more or larger GPUs" if placement.on_gpu else "use --dtype bfloat16, a smaller picture, or GPUs"
    if not proposals:
        print(f"No place of the parts, option or block size makes it fit: {way_out}.")
        return 1
    print("It would fit with any of these, the least change of the video first:")
    for proposal in proposals:
        print("\n" + describe_proposal(proposal, plan))
    return 1


def describe_proposal(proposal: Proposal, asked: JobPlan) -> str:
    """A proposal as text: the flags, then bytes, times and what changes, one line each."""
    plan, memory = proposal.plan, proposal.plan.memory
    needs = f"{', '.join(f'{rank.total / 1e9:.1f}' for rank in memory.ranks)} GB on the ranks"
    if plan.placement.on_gpu and plan.placement.codec_rank is None:
        needs += f", {gigabytes(memory.codec)} for the codec"
    lines = [needs if plan.placement.on_gpu else f"{gigabytes(plan.bytes_in_all)} together", *_times(plan, asked)]
    return "\n".join([f"  {proposal.flags}", *(f"      {line}" for line in (*lines, *changes_in_words(asked, plan)))])


def describe(plan: JobPlan, speed_source: str, split_source: str = "") -> str:
    """The plan as text: the video, where each part goes, bytes, times; `split_source` says how the layers were split."""
    request, placement, blocks = plan.request, plan.placement, plan.workload.schedule.plan
    assert request.fps
    ranks = len(placement.layers)
    where = "a device of its own" if placement.codec_rank is None else f"the device of rank {placement.codec_rank}"
    text = {"keep": "stays there", "free": "is dropped after encoding", "cpu": "waits in host memory"}[placement.text_encoder]
    lines = [
        f"{plan.num_frames} frames ({plan.num_frames / request.fps:.1f} s) of {request.width}x{request.height} in "
        f"{blocks.num_blocks} blocks of {request.num_per_block} latents with {request.num_cat} of context, "
        f"{request.num_inference_steps} steps, {plan.workload.schedule.num_in_flight()} blocks in flight at most"
        f"{_skipping(plan.workload.schedule)}",
        f"{ranks} rank{'s' * (ranks > 1)} with {', '.join(map(str, placement.layers))} layers{split_source} in "
        f"{placement.dtype}{_low_memory(placement)}; codec "
        f"(text encoder, VAE in {placement.vae_dtype}) on "
        f"{where if placement.on_gpu else 'the CPU'}; the text encoder {text}",
        "",
        format_plan(plan.memory),
    ]
    if not placement.on_gpu:
        lines.append(f"This host runs it all: {gigabytes(plan.bytes_in_all)} together.")
    if placement.bytes_per_device is not None and plan.refusal is None:
        of = "of each GPU" if placement.on_gpu else "of this host"
        lines.append(f"It fits the {gigabytes(placement.bytes_per_device)} {of}.")
    if plan.forecast is None or plan.sweep_s is None or plan.first_frames_s is None or plan.total_s is None:
        return "\n".join([*lines, "", f"Work: {plan.workload.total_flops():.3g} FLOPs; {speed_source}."])
    busy = ", ".join(f"{share:.0%}" for share in plan.forecast.busy)
    return "\n".join([
        *lines, "",
        f"Time at {speed_source}, with loading, text encoding{_on_their_way(plan)} left out:",
        f"  a sweep up to {duration(plan.sweep_s)}, first frames after {duration(plan.first_frames_s)}, "
        f"all after {duration(plan.total_s)}; stages busy {busy}",
    ])  # fmt: skip


def _skipping(schedule: Schedule) -> str:
    if schedule.max_order is None:
        return ""
    steps = [item for item in schedule.items if item.is_whole]
    computed = sum(not item.is_skipped for item in steps) / len(steps)
    return f"; {computed:.0%} of the block steps are computed, the others extrapolated"


def _low_memory(placement: Placement) -> str:
    stored = f" (weights in {placement.quantization})" if placement.quantization else ""
    caches = ", left caches in host memory" if placement.is_cache_offloaded else ""
    return stored + (", which wait in host memory" if placement.is_offloaded else "") + caches


def _on_their_way(plan: JobPlan) -> str:
    """What a plan's times leave out where copies to and from host memory have not been measured."""
    if plan.speed is None or plan.speed.link_bytes_per_s is not None:
        return ""
    away = [("layers", plan.placement.is_offloaded), ("caches", plan.placement.is_cache_offloaded)]
    return "".join(f", {what} on their way" for what, is_away in away if is_away)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _times(plan: JobPlan, asked: JobPlan) -> list[str]:
    share = f"{plan.workload.total_flops() / asked.workload.total_flops():.0%} of the work"
    if plan.total_s is None or plan.first_frames_s is None or plan.sweep_s is None:
        return [share]
    frames = f"first frames after {duration(plan.first_frames_s)}, all after {duration(plan.total_s)}"
    return [f"a sweep up to {duration(plan.sweep_s)}, {frames}; {share}"]


def _placement(options: argparse.Namespace, preset: Preset, model: ModelSizes) -> Placement:
    gpus = options.gpus if options.gpus is not None else count_gpus()
    is_cpu = options.device == "cpu" or (options.device == "auto" and gpus == 0)
    if options.gpu_memory is not None and is_cpu:
        raise RequestError("gpu_memory is given without GPUs; add --gpus", "gpu_memory")
    if (options.gpus is not None and options.gpus < 1) or (options.gpu_memory is not None and options.gpu_memory <= 0):
        raise RequestError("gpus and gpu_memory must be more than 0", "gpus")
    ranks = options.ranks or (1 if is_cpu else max(1, gpus))
    if not is_cpu and ranks > max(1, gpus):
        raise RequestError(f"ranks={ranks} needs {ranks} GPUs, there are {gpus}; use fewer ranks", "ranks")
    split = layer_counts(options.layer_split)
    given = None if isinstance(split, str) else split  # auto begins with the even split
    layers = split_layers(DiTSizes.of(model.config).num_layers, ranks if given is None else len(given), given)
    return Placement(
        layers=tuple(len(stage) for stage in layers),
        dtype=dtype_name(options.dtype, "float32" if is_cpu else preset.dtype, "dtype"),
        vae_dtype=dtype_name(options.vae_dtype, preset.vae_dtype, "vae_dtype"),
        codec_rank=None if is_cpu or gpus > len(layers) else len(layers) - 1,
        on_gpu=not is_cpu,
        bytes_per_device=_memory(options.gpu_memory, is_cpu),
        text_encoder=options.text_encoder,
        quantization=options.quantization,
        is_offloaded=check_offload(options.offload, on_gpu=not is_cpu, quantization=options.quantization, is_compiled=False),
        is_cache_offloaded=check_offload_cache(options.offload_cache, on_gpu=not is_cpu),
    )


def _memory(gpu_memory: float | None, is_cpu: bool) -> int | None:
    if gpu_memory is not None:
        return int(gpu_memory * 1e9)
    return bytes_per_device("cpu" if is_cpu else "cuda")


def _speed(
    options: argparse.Namespace, request: GenerationRequest, model: ModelSizes, placement: Placement
) -> tuple[Speed | None, str]:
    """The speed to plan with, and where it comes from."""
    if options.flops is not None:
        if options.flops <= 0:
            raise RequestError(f"flops={options.flops} is not a speed; give 10^12 FLOP/s of one device", "flops")
        return Speed(flops_per_s=options.flops * 1e12), f"{options.flops:g} TFLOP/s, decoding left out"
    sizes, device = DiTSizes.of(model.config), "cuda" if placement.on_gpu else "cpu"
    speed = load_speed(device, placement.dtype, sizes.dim)
    if options.calibrate:
        speed = _calibrate(request, model, placement, device)
        print(f"kept in {store_speed(device, placement.dtype, sizes.dim, speed)}", file=sys.stderr, flush=True)
    if speed is None:
        return None, (
            "for times add --calibrate on the machine itself (it measures one layer and the VAE, and remembers), or say with "
            "--flops how many TFLOP/s one GPU does"
        )
    return speed, f"{speed.flops_per_s / 1e12:.3g} TFLOP/s as measured on this host's {device}"


def _calibrate(request: GenerationRequest, model: ModelSizes, placement: Placement, device: str) -> Speed:
    if device == "cuda" and count_gpus() == 0:
        raise RequestError("there is no GPU on this host to calibrate; give --flops, or --device cpu", "calibrate")
    from dualparal.model.calibrate import calibrate

    assert request.height and request.width and request.num_per_block and request.num_cat is not None
    per_frame = DiTSizes.of(model.config).tokens_per_frame(request.height, request.width)
    num_tokens = max(1, (request.num_per_block + request.num_cat) * per_frame)
    size_px = (request.height, request.width) if device == "cuda" else (64, 64)
    return calibrate(
        model.config, device=device, dtype=placement.dtype, num_tokens=num_tokens, size_px=size_px,
        vae_dtype=placement.vae_dtype,
    )  # fmt: skip
