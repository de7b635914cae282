"""Block steps of a whole stage on one CUDA device at Wan's real shapes, random weights, bf16, against `WanPipeline`'s forward.

    python -m benchmarks.gpu [--model 1.3b] [--layers 30] [--attention native] [--compile] [--quantization fp8] [--offload]
                             [--context cached [--offload_cache]]

For several windows: time per item and per own latent, against diffusers' own transformer over a whole video of 21 latents in
the same run (guidance halves one after the other, as `WanPipeline` runs them); share of the card's measured bf16 matmul
peak; peak memory against the plan. Weights are made on the device: no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from dualparal.method.rules import rules_of
from dualparal.method.schedule import make_schedule
from dualparal.model import stage as stage_module
from dualparal.model.checkpoint import keeps_float32
from dualparal.model.low_memory import Quantizer
from dualparal.model.stage import JobShape, Stage
from dualparal.planning.memory import GPU_RUNTIME_BYTES, memory_plan, workload_of
from dualparal.planning.sizes import WAN_1_3B, WAN_14B
from dualparal.request import Settings

WINDOWS = ((8, 8), (8, 4), (8, 0), (4, 4), (16, 8))  # num_per_block, num_cat
DEVICE = "cuda"
WHOLE_LATENTS = 21  # 81 frames, Wan's own length


@dataclass(frozen=True)
class Measured:
    """Median seconds of an ordinary item (own frames, left context, right cache), its FLOPs, and the peak of the device."""

    seconds: float
    flops: int
    peak_bytes: int


class _Shape:
    """What `Stage` asks of a checkpoint, without files."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self.num_layers = int(config["num_layers"])
        self.transformers = ("transformer",)

    def config(self, component: str) -> dict[str, Any]:
        return self._config


def random_model(
    config: Mapping[str, Any], device: torch.device | str = DEVICE, quantization: str | None = None
) -> WanTransformer3DModel:
    """A transformer of this shape, small random weights, upstream's float32 parts in float32."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if keeps_float32(name):
            parameter.data = parameter.data.float()
    model = model.to_empty(device=device).requires_grad_(False).eval()
    quantizer = Quantizer(model, quantization, torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.uniform_(-0.02, 0.02)
        parameter.data = parameter.data.to(quantizer.storage_dtype(name, parameter.dtype))
        quantizer.after(name)
    quantizer.finish()
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return model


def measure_steps(
    config: Mapping[str, Any], request: Settings, *, num_items: int = 24, attention: str | None = None,
    is_compiled: bool = False, quantization: str | None = None, is_offloaded: bool = False, is_cache_offloaded: bool = False,
) -> Measured:  # fmt: skip
    """Run the first items of `request`'s schedule on a stage that holds all layers of `config`."""
    gc.collect()  # compiled layers are cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with patch.object(stage_module, "load_transformer_share", _load(config)):
        layers = range(int(config["num_layers"]))
        stage = Stage(
            _Shape(config), layers, dtype="bfloat16", device=DEVICE, attention=attention, is_compiled=is_compiled,  # type: ignore[arg-type]
            quantization=quantization, is_offloaded=is_offloaded, is_cache_offloaded=is_cache_offloaded,
        )  # fmt: skip
    workload = workload_of(request, config, [len(layers)], rules=rules_of(request))
    schedule = make_schedule(rules_of(request), workload.schedule.plan, (0,) * request.num_inference_steps)
    halves = [torch.randn(1, 512, int(config["text_dim"])) for _ in range(workload.num_halves)]
    timesteps = torch.linspace(999, 1, request.num_inference_steps).long()
    shape = JobShape(
        request.height // 8, request.width // 8, len(halves), (request.guidance_scale,) * 2, (0,) * schedule.plan.num_blocks
    )
    stage.begin(shape, schedule, stage.embed_conditions(timesteps, [halves]))
    found: dict[int, list[float]] = {}
    for item in schedule.items[:num_items]:
        window = torch.randn(1, stage.channels, sum(schedule.window_frames(item)), shape.height, shape.width)
        seconds = _timed(lambda item=item, window=window: stage.run(item, window))
        found.setdefault(sum(workload.item_flops(item)), []).append(seconds)
    flops = max(found)
    times = sorted(found[flops][1:] or found[flops])  # the first one warms up
    stage.end()
    return Measured(times[len(times) // 2], flops, torch.cuda.max_memory_allocated())


def _load(config: Mapping[str, Any]) -> Callable[..., WanTransformer3DModel]:
    def load(*_: Any, device: torch.device, quantization: str | None, **__: Any) -> WanTransformer3DModel:
        return random_model(config, device, quantization)

    return load


def measure_whole(config: Mapping[str, Any], height: int, width: int) -> float:
    """Seconds of both guidance halves of one step of diffusers' transformer over `WHOLE_LATENTS` latents."""
    model = random_model(config)
    latents = torch.randn(1, model.config.in_channels, WHOLE_LATENTS, height // 8, width // 8, device=DEVICE).bfloat16()
    text = torch.randn(1, 512, model.config.text_dim, device=DEVICE).bfloat16()
    timestep = torch.tensor([500], device=DEVICE)

    def step() -> None:
        for _ in range(2):
            model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)

    with torch.inference_mode():
        step()
        return sorted(_timed(step) for _ in range(3))[1]


def matmul_peak(size: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product on this card."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(_timed(lambda: torch.mm(a, b)) for _ in range(10))


def _timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started_s


def _request(num_per_block: int, num_cat: int, height: int, width: int, context: Any) -> Settings:
    return Settings(
        prompt="x", negative_prompt="", latents_num=6 * num_per_block, height=height, width=width, fps=16, seed=0,
        num_inference_steps=8, guidance_scale=5.0, guidance_scale_2=5.0, flow_shift=3.0, num_per_block=num_per_block,
        num_cat=num_cat, schedule="paper", context=context,
    )  # fmt: skip


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("1.3b", "14b"), default="1.3b")
    parser.add_argument("--layers", type=int, help="layers on this card (default: all of the model)")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--attention", help="backend of diffusers' dispatcher")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quantization", choices=("fp8", "int8"))
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--context", choices=("recomputed", "cached"), default="recomputed")
    parser.add_argument("--offload_cache", action="store_true", help="left caches wait in host memory")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; this host has none")
    from benchmarks.common import hardware, table

    config = {"1.3b": WAN_1_3B, "14b": WAN_14B}[options.model]
    config = {**config, "num_layers": options.layers or config["num_layers"]}
    peak = matmul_peak()
    try:
        per_latent_s = measure_whole(config, options.height, options.width) / WHOLE_LATENTS
    except torch.cuda.OutOfMemoryError:  # what offload is for
        per_latent_s = float("nan")
    rows = []
    for num_per_block, num_cat in WINDOWS:
        request = _request(num_per_block, num_cat, options.height, options.width, options.context)
        found = measure_steps(config, request, attention=options.attention, is_compiled=options.compile,
                              quantization=options.quantization, is_offloaded=options.offload,
                              is_cache_offloaded=options.offload_cache)  # fmt: skip
        plan = memory_plan(
            workload_of(request, config, [config["num_layers"]], rules=rules_of(request)),
            height=options.height,
            width=options.width,
            quantization=options.quantization,
            is_offloaded=options.offload,
            is_cache_offloaded=options.offload_cache,
        ).ranks[0]
        planned = plan.total - plan.latents - plan.codec - GPU_RUNTIME_BYTES
        own_s = found.seconds / num_per_block
        rows.append((
            num_per_block, num_cat, f"{found.seconds * 1e3:.1f}", f"{own_s * 1e3:.1f}", f"{own_s / per_latent_s:.2f}",
            f"{found.flops / found.seconds / peak:.0%}", f"{found.peak_bytes / 1e9:.2f}", f"{planned / 1e9:.2f}",
        ))  # fmt: skip
    print(f"{hardware()}\n")
    extras = [name for name, is_on in (("compiled", options.compile), ("offloaded", options.offload),
                                (f"{options.context} context", options.context == "cached"),
                                ("left caches offloaded", options.offload_cache)) if is_on]  # fmt: skip
    variant = ", ".join([f"attention {options.attention or 'native'}", *filter(None, [options.quantization]), *extras])
    print(
        f"{options.model}, {config['num_layers']} layers, {options.width}x{options.height}, bf16, {variant}; matmul peak "
        f"{peak / 1e12:.0f} TFLOP/s; diffusers' transformer: {per_latent_s * 1e3:.1f} ms per latent of a "
        f"{WHOLE_LATENTS}-latent video.\n"
    )
    header = ("num_per_block", "num_cat", "item, ms", "per own latent, ms", "against diffusers", "of matmul peak",
              "peak, GB", "plan, GB")  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
