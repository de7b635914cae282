"""What only a CUDA device can show. Skipped with a reason elsewhere; `pytest tests/gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from dualparal import Engine, GenerationRequest, Settings
from dualparal.errors import RequestError
from dualparal.method.rules import rules_of
from dualparal.model.calibrate import calibrate
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import Stage
from dualparal.model.tiny import write_tiny_checkpoint
from dualparal.planning.memory import GPU_RUNTIME_BYTES, memory_plan, workload_of
from dualparal.planning.sizes import WAN_1_3B
from tests.local_ring import denoise_in_threads
from tests.texts import joined, some_texts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this host has none")
NUM_GPUS = torch.cuda.device_count()
ASKED: dict[str, Any] = dict(
    prompt="x", latents_num=9, height=64, width=64, num_inference_steps=4, seed=1, num_per_block=3, num_cat=2
)


@pytest.fixture(autouse=True)
def empty_card() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


def latents_of(folder: Path, outputs: Path, **options: Any) -> torch.Tensor:
    with Engine(str(folder), outputs=outputs, **options) as engine:
        found = engine.submit(GenerationRequest(**ASKED), return_latents=True).result(timeout=600).latents
    return torch.as_tensor(found)


def test_float32_is_near_the_cpus(tiny: Path, tmp_path: Path) -> None:
    on_cpu = latents_of(tiny, tmp_path / "cpu", device="cpu", dtype="float32")
    on_gpu = latents_of(tiny, tmp_path / "gpu", device="cuda", dtype="float32")
    assert (on_cpu - on_gpu).abs().max() < 1e-2


def test_one_block_in_bfloat16_is_near_diffusers(tiny: Path) -> None:
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = some_texts()
    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.bfloat16).to("cuda")
    expected = pipeline(
        prompt_embeds=texts[0][0].cuda(), negative_prompt_embeds=texts[0][1].cuda(), height=64, width=64, num_frames=13,
        num_inference_steps=4, guidance_scale=5.0, latents=noise.cuda(), output_type="latent",
    ).frames.float().cpu()  # fmt: skip
    found = joined(
        denoise_in_threads(
            tiny,
            latents_num=4,
            num_per_block=4,
            num_cat=0,
            steps=4,
            texts=texts,
            noise=[noise],
            size=(8, 8),
            dtype="bfloat16",
            device="cuda",
        )
    )
    assert (found - expected).abs().mean() < 0.05


@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA devices, this host has {NUM_GPUS}")
def test_the_same_bits_on_two_cards(tiny: Path, tmp_path: Path) -> None:
    one = latents_of(tiny, tmp_path / "one", ranks=1, device="cuda", dtype="bfloat16")
    two = latents_of(tiny, tmp_path / "two", ranks=2, device="cuda", dtype="bfloat16")
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["_native_flash", "_native_efficient", "_native_cudnn", "flash", "sage"])
def test_attention_backends(tmp_path: Path, name: str) -> None:
    tiny = write_tiny_checkpoint(tmp_path / "model", num_heads=4, head_dim=64)  # what each of them accepts
    case: dict[str, Any] = dict(latents_num=7, num_per_block=2, num_cat=1, steps=2, texts=some_texts(), dtype="bfloat16")
    plain = joined(denoise_in_threads(tiny, device="cuda", **case))
    try:
        found = joined(denoise_in_threads(tiny, device="cuda", attention=name, **case))
    except RequestError as refused:
        pytest.skip(str(refused))
    assert (plain - found).abs().mean() < 0.05


def test_calibration_measures_the_card() -> None:
    speed = calibrate(WAN_1_3B, device="cuda", dtype="bfloat16", num_tokens=16 * 1560)
    assert speed.flops_per_s > 1e12
    assert speed.link_bytes_per_s is not None and speed.link_bytes_per_s > 1e9


def test_peak_memory_of_a_real_stage_is_the_plans() -> None:
    """Weights, cache and activations of five 1.3B layers at 480p, within a few per cent."""
    from benchmarks.gpu import measure_steps

    request = Settings(
        prompt="x", negative_prompt="", latents_num=40, height=480, width=832, fps=16, seed=0, num_inference_steps=8,
        guidance_scale=5.0, guidance_scale_2=5.0, flow_shift=3.0, num_per_block=8, num_cat=8, schedule="paper",
        context="recomputed",
    )  # fmt: skip
    found = measure_steps({**WAN_1_3B, "num_layers": 5}, request, num_items=12)
    plan = memory_plan(workload_of(request, {**WAN_1_3B, "num_layers": 5}, [5]), height=480, width=832).ranks[0]
    held_by_the_stage = plan.total - plan.latents - plan.codec - GPU_RUNTIME_BYTES
    assert 0.9 * held_by_the_stage <= found.peak_bytes <= 1.1 * held_by_the_stage


def test_offloaded_layers_give_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    plain = latents_of(tiny, tmp_path / "plain", device="cuda")
    moved = latents_of(tiny, tmp_path / "moved", device="cuda", offload=True)
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("micro_batches", [False, True])
def test_left_caches_in_host_memory_give_the_same_bits(tiny: Path, tmp_path: Path, micro_batches: bool) -> None:
    asked = GenerationRequest(**{**ASKED, "latents_num": 21}, context="cached", micro_batches=micro_batches)
    found = []
    for offload_cache in (False, True):
        with Engine(str(tiny), outputs=tmp_path / str(offload_cache), device="cuda", offload_cache=offload_cache) as engine:
            found.append(engine.submit(asked, return_latents=True).result(timeout=600).latents)
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[1]))


def test_left_caches_in_host_memory_leave_room() -> None:
    """What `context="cached"` takes on the card is the plan's, a fraction of what it is without the option."""
    from benchmarks.gpu import measure_steps

    request = Settings(
        prompt="x", negative_prompt="", latents_num=64, height=480, width=832, fps=16, seed=0, num_inference_steps=8,
        guidance_scale=5.0, guidance_scale_2=5.0, flow_shift=3.0, num_per_block=8, num_cat=8, schedule="paper",
        context="cached",
    )  # fmt: skip
    config = {**WAN_1_3B, "num_layers": 8}
    stays, waits = (measure_steps(config, request, num_items=30, is_cache_offloaded=away).peak_bytes for away in (False, True))
    planned = [
        memory_plan(workload_of(request, config, [8], rules=rules_of(request)), height=480, width=832, is_cache_offloaded=away)
        for away in (False, True)
    ]
    saved = planned[0].ranks[0].feature_cache - planned[1].ranks[0].feature_cache
    assert 0.8 * saved <= stays - waits <= 1.2 * saved


def test_offloaded_layers_leave_room(tmp_path: Path) -> None:
    """After loading none of the layers is on the card."""
    folder = write_tiny_checkpoint(tmp_path / "model", num_layers=6, num_heads=8, head_dim=64, ffn_dim=2048)
    before = torch.cuda.memory_allocated()
    stage = Stage(Checkpoint(folder), range(6), dtype="bfloat16", device="cuda:0", is_offloaded=True)
    outside = sum(v.nbytes for name, v in stage.models[0].named_parameters() if not name.startswith("blocks."))
    assert torch.cuda.memory_allocated() - before <= 1.1 * outside + 2**20


def test_fp8_weights_on_a_card(tiny: Path, tmp_path: Path) -> None:
    plain = latents_of(tiny, tmp_path / "plain", device="cuda")
    small = latents_of(tiny, tmp_path / "small", device="cuda", quantization="fp8")
    both = latents_of(tiny, tmp_path / "both", device="cuda", quantization="fp8", offload=True)
    assert 0 < (plain - small).abs().max() < 1.0
    assert torch.equal(small, both)
