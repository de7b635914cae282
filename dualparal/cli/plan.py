"""`python -m dualparal plan`: what fits where, bytes per rank, times, and what to change when it does not fit.

Works before any download; with `--calibrate` it first measures this host's device (only then torch is imported).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import replace

from dualparal.cli.flags import add_fields, add_model_flags, add_request_flags, find_asked, given
from dualparal.devices import bytes_per_device, count_gpus
from dualparal.errors import RequestError
from dualparal.limits import wait_passively
from dualparal.method.grid import Grid
from dualparal.method.schedule import Schedule
from dualparal.options import AUTO_SPLIT, EngineOptions, of
from dualparal.planning.calibration import load_speed, store_speed
from dualparal.planning.idle import idle_ranks
from dualparal.planning.job_plan import JobPlan, fastest_layers, plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory_table import format_plan, gigabytes
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.proposals import Proposal, changes_in_words, propose
from dualparal.planning.rings import in_other_rings
from dualparal.planning.room import settle
from dualparal.planning.sizes import DiTSizes
from dualparal.presets import USUAL, Preset, complete
from dualparal.request import GenerationRequest, Settings


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    add_request_flags(parser, needs_prompt=False)
    devices = parser.add_argument_group("the devices")
    add_model_flags(devices.add_argument)
    devices.add_argument("--gpus", type=int, metavar="N", help="GPUs to plan for (default: those of this host)")
    devices.add_argument("--gpu_memory", type=float, metavar="GB", help="memory of each GPU in GB of 10^9 bytes")
    add_fields(devices.add_argument, EngineOptions, of("job"), defaults={"ranks": "one for each GPU"})
    speed = parser.add_argument_group("the times")
    speed.add_argument("--flops", type=float, metavar="TFLOPS", help="10^12 FLOP/s of one device, instead of a calibration")
    speed.add_argument("--calibrate", action="store_true", help="measure this host's device first, and remember it")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; 0 when it fits, 1 when not."""
    from dualparal.model.known import find_sizes
    from dualparal.model.lora_shelf import LoraShelf
    from dualparal.model.part_shapes import transformer_shapes

    name, preset = find_asked(options)
    model = find_sizes(name, preset)
    model = replace(model, lora_elements=LoraShelf(None, model.num_experts, transformer_shapes(model.config)).elements)
    placement = _placement(options, preset, model)
    asked = GenerationRequest(**{"prompt": USUAL.prompt, **given(GenerationRequest, options)})
    speed, source = _speed(options, asked, preset, model, placement)
    settled = functools.partial(settle, preset=preset, sizes=model, speed=speed, host_bytes=_host_bytes(options))
    placement = settle_text_encoder(settled(USUAL, placement=placement), model, placement)  # as an engine does
    request = settled(asked, placement=placement)
    split = ""
    if options.layer_split == AUTO_SPLIT:
        placement = replace(placement, layers=fastest_layers(request, model, placement, speed))
        split = f" (the fastest by {'measured times' if speed and options.flops is None else 'FLOPs'})"
    plan = plan_job(request, model, placement, speed=speed)
    print(describe(plan, source, split))
    if plan.refusal is None:
        if (other := in_other_rings(plan, model)) is not None and plan.total_s is not None:
            print(describe_other(other, plan))
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


def describe_other(other: JobPlan, plan: JobPlan) -> str:
    """The same ranks in one ring, or two, in a line."""
    guidance = other.placement.guidance
    begin = f"  with --guidance_parallel {guidance}, {'two rings' if guidance > 1 else 'one ring'}:"
    if other.refusal is not None:
        return f"{begin} does not fit ({gigabytes(other.bytes_per_rank)} on a rank)"
    assert other.first_frames_s is not None and other.total_s is not None
    bits = "the same bits" if plan.request.micro_batches else "other bits within 1e-5, as the halves leave one by one"
    return (
        f"{begin} first frames after {duration(other.first_frames_s)}, all after {duration(other.total_s)}, "
        f"{gigabytes(other.bytes_per_rank)} on a rank; {bits}"
    )


def describe(plan: JobPlan, speed_source: str, split_source: str = "") -> str:
    """The plan as text: the video, where each part goes, bytes, times; `split_source` says how the layers were split."""
    request, placement, blocks = plan.request, plan.placement, plan.workload.schedule.plan
    ranks, rings = placement.grid.ranks, ", two rings of stages," if placement.guidance > 1 else ""
    where = "a device of its own" if placement.codec_rank is None else f"the device of rank {placement.codec_rank}"
    text = {"keep": "stays there", "free": "is dropped after encoding", "cpu": "waits in host memory"}[placement.text_encoder]
    lines = [
        f"{plan.num_frames} frames ({plan.num_frames / request.fps:.1f} s) of {request.width}x{request.height} in "
        f"{blocks.num_blocks} blocks of {request.num_per_block} latents with {request.num_cat} of context, "
        f"{request.num_inference_steps} steps, {plan.workload.schedule.num_in_flight()} blocks in flight at most"
        f"{_skipping(plan.workload.schedule)}",
        f"{ranks} rank{'s' * (ranks > 1)}{rings} with {', '.join(map(str, placement.layers))} layers{split_source} in "
        f"{placement.dtype}{_low_memory(placement)}; codec "
        f"(text encoder, VAE in {placement.vae_dtype}) on "
        f"{where if placement.on_gpu else 'the CPU'}; the text encoder {text}",
        *([f"auto: {request.chosen}"] if request.chosen else []),
        *([f"note: {idle}"] if (idle := idle_ranks(request, placement.grid)) else []),
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
    asked = EngineOptions(**given(EngineOptions, options))
    is_cpu = asked.device == "cpu" or (asked.device == "auto" and gpus == 0)
    if options.gpu_memory is not None and is_cpu:
        raise RequestError("gpu_memory is given without GPUs; add --gpus", "gpu_memory")
    if (options.gpus is not None and options.gpus < 1) or (
        options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf
    ):
        raise RequestError("gpus and gpu_memory must be more than 0", "gpus")
    ranks = options.ranks or (1 if is_cpu else max(1, gpus))
    if not is_cpu and ranks > max(1, gpus):
        raise RequestError(f"ranks={ranks} needs {ranks} GPUs, there are {gpus}; use fewer ranks", "ranks")
    asked.check_places(on_gpu=not is_cpu)
    counts = None if isinstance(asked.layer_split, str) else asked.layer_split  # auto begins with the even split
    stages = Grid.of(ranks, asked.guidance_parallel).stages if counts is None else len(counts)
    layers = split_layers(DiTSizes.of(model.config).num_layers, stages, counts)
    settled = asked.settled(
        device="cpu" if is_cpu else "cuda", dtype=asked.dtype or ("float32" if is_cpu else preset.dtype),
        vae_dtype=asked.vae_dtype or preset.vae_dtype,
    )  # fmt: skip
    return Placement.of(
        settled, layers=tuple(len(stage) for stage in layers), bytes_per_device=_memory(options.gpu_memory, is_cpu),
        codec_rank=None if is_cpu or gpus > stages * asked.guidance_parallel else stages * asked.guidance_parallel - 1,
    )  # fmt: skip


def _memory(gpu_memory: float | None, is_cpu: bool) -> int | None:
    if gpu_memory is not None:
        return int(gpu_memory * 1e9)
    return bytes_per_device("cpu" if is_cpu else "cuda")


def _host_bytes(options: argparse.Namespace) -> int | None:
    """Memory of the host, where it is this one that is planned for."""
    return bytes_per_device("cpu") if options.gpus is None else None


def _speed(
    options: argparse.Namespace, asked: GenerationRequest, preset: Preset, model: ModelSizes, placement: Placement
) -> tuple[Speed | None, str]:
    """The speed to plan with, and where it comes from."""
    if options.flops is not None:
        if not 0 < options.flops < math.inf:
            raise RequestError(f"flops={options.flops} is not a speed; give 10^12 FLOP/s of one device", "flops")
        return Speed(flops_per_s=options.flops * 1e12), f"{options.flops:g} TFLOP/s, decoding left out"
    sizes, device = DiTSizes.of(model.config), "cuda" if placement.on_gpu else "cpu"
    speed = load_speed(device, placement.dtype, sizes.dim)
    if options.calibrate:
        speed = _calibrate(complete(asked, preset, num_experts=model.num_experts), model, placement, device)
        print(f"kept in {store_speed(device, placement.dtype, sizes.dim, speed)}", file=sys.stderr, flush=True)
    if speed is None:
        return None, (
            "for times add --calibrate on the machine itself (it measures one layer and the VAE, and remembers), or say with "
            "--flops how many TFLOP/s one GPU does"
        )
    return speed, f"{speed.flops_per_s / 1e12:.3g} TFLOP/s as measured on this host's {device}"


def _calibrate(request: Settings, model: ModelSizes, placement: Placement, device: str) -> Speed:
    if device == "cuda" and count_gpus() == 0:
        raise RequestError("there is no GPU on this host to calibrate; give --flops, or --device cpu", "calibrate")
    wait_passively()  # before torch is loaded
    from dualparal.model.calibrate import calibrate

    per_frame = model.tokens_per_frame(request.height, request.width)
    num_tokens = max(1, (request.num_per_block + request.num_cat) * per_frame)
    size_px = (request.height, request.width) if device == "cuda" else (64, 64)
    return calibrate(
        model.config, device=device, dtype=placement.dtype, num_tokens=num_tokens, size_px=size_px,
        vae_dtype=placement.vae_dtype, vae=model.vae,
    )  # fmt: skip
