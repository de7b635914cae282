"""The flags that several commands share, and the engine they ask for: of a video, of an engine.

The authors' flag names all work, with diffusers' names beside them. Imports no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dualparal.cli_plan import add_low_memory_flags
from dualparal.presets import find_preset, load_presets
from dualparal.request import CONTEXTS, SCHEDULES
from dualparal.runtime.engine_options import TEXT_ENCODER_PLACES
from dualparal.runtime.torchrun import find_team


def add_request_flags(parser: argparse.ArgumentParser, needs_prompt: bool = True) -> None:
    request = parser.add_argument_group("the video (what is left out comes from the model's preset)")
    request.add_argument("--prompt", required=needs_prompt)
    request.add_argument("--negative_prompt")
    request.add_argument("--seconds", type=float, help="length in seconds")
    request.add_argument("--latents_num", type=int, help="length in latent frames")
    request.add_argument("--num_frames", type=int, help="length in video frames, 4k + 1")
    request.add_argument("--height", type=int, metavar="PX")
    request.add_argument("--width", type=int, metavar="PX")
    request.add_argument("--fps", type=int)
    request.add_argument("--sample_steps", "--num_inference_steps", dest="num_inference_steps", type=int, metavar="N")
    request.add_argument("--sample_guide_scale", "--guidance_scale", dest="guidance_scale", type=float, metavar="X")
    request.add_argument("--sample_guide_scale2", "--guidance_scale_2", dest="guidance_scale_2", type=float, metavar="X")
    request.add_argument("--guidance_start", type=float, metavar="SHARE", help="of the steps, before which guidance is off")
    request.add_argument("--guidance_stop", type=float, metavar="SHARE", help="of the steps, from which on guidance is off")
    request.add_argument("--boundary_ratio", type=float, metavar="X")
    request.add_argument("--flow_shift", type=float, metavar="X")
    request.add_argument("--seed", type=int)
    request.add_argument("--num_per_block", type=int, metavar="N")
    request.add_argument("--num_cat", type=int, metavar="N")
    request.add_argument("--schedule", choices=SCHEDULES, help="paper: the authors' order; preview: first frames soonest")
    request.add_argument("--context", choices=CONTEXTS, help="left context run again, or kept as K and V (more memory, faster)")
    request.add_argument("--max_in_flight", type=int, metavar="N", help="blocks denoised at once (preview)")
    request.add_argument("--stagger", type=int, metavar="N", help="steps between neighbouring blocks (preview)")
    request.add_argument("--micro_batches", type=_on_off, metavar="on|off", help="guidance halves travel one by one")
    request.add_argument(
        "--cache_interval", type=int, metavar="N",
        help="step caching: compute every N-th step, extrapolate the others (faster, other pictures)",
    )  # fmt: skip
    request.add_argument("--cache_order", type=int, metavar="0|1|2", help="order of the extrapolation (default 1)")
    request.add_argument("--disable_cache_before_step", type=int, metavar="N", help="until it all are computed (default 3)")
    request.add_argument(
        "--disable_cache_after_step", type=int, metavar="N", help="from it on all are computed (the last step always is)"
    )


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--model_id", metavar="MODEL", help="folder in diffusers' layout, hub id, or a preset's name")
    engine.add_argument("--preset", help="preset to take values (and, without --model_id, the model) from")
    engine.add_argument("--presets_folder", type=Path, help="also read presets from here")
    engine.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (GPUs) that share the model's layers")
    engine.add_argument("--layer_split", metavar="auto|N,N,...", help="layers per rank: the fastest, or these (default: even)")
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda")
    engine.add_argument("--dtype", help="dtype of the DiT: fp32, fp16, bf16 or torch's names")
    engine.add_argument("--threads", type=int, metavar="N", help="CPU threads per process")
    engine.add_argument("--attention", metavar="NAME", help="attention backend of diffusers: native, flash, sage, ...")
    engine.add_argument("--compile", action="store_true", help="run layers through torch.compile")
    add_low_memory_flags(engine.add_argument)
    engine.add_argument("--vae_dtype", help="dtype of the VAE (default: the preset's)")
    engine.add_argument("--text_encoder", choices=TEXT_ENCODER_PLACES, default="auto", help="where it is after encoding")
    engine.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help="file, folder or hub id of a LoRA; repeatable"
    )
    engine.add_argument(
        "--outputs", type=Path, metavar="FOLDER", help="where jobs are kept (default: DUALPARAL_OUTPUTS or outputs)"
    )
    engine.add_argument("--verbose", action="store_true", help="log what every process does")
    engine.add_argument("--log_json", action="store_true", help="log one JSON object a line, with worker and job id")


def make_engine(options: argparse.Namespace) -> Any:
    """An engine from the flags of `add_engine_flags`; nothing is started."""
    from dualparal.runtime.engine import Engine

    presets = load_presets(options.presets_folder)
    model = options.model_id or options.preset or "pocket"
    preset = presets.get(options.preset) if options.preset else find_preset(model, presets)
    if preset is None:
        preset = find_preset(options.preset, presets)
    return Engine(
        model, preset=preset, ranks=options.ranks, device=options.device, dtype=options.dtype, threads=options.threads,
        layer_split=options.layer_split, outputs=options.outputs, verbose=options.verbose, log_json=options.log_json,
        attention=options.attention, compile=options.compile, vae_dtype=options.vae_dtype,
        quantization=options.quantization, offload=options.offload, offload_cache=options.offload_cache,
        text_encoder=options.text_encoder, loras=options.lora, team=find_team(),
    )  # fmt: skip
