"""Sizes, work and memory against the real modules, and against numbers worked out by hand."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from dualparal.method.borders import tensors_of_block
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Context, Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.model.checkpoint import keeps_float32
from dualparal.model.feature_cache import CrossAttention, SelfAttention, Surroundings
from dualparal.model.part_shapes import transformer_owners
from dualparal.model.vae import StreamingDecoder
from dualparal.planning.job_plan import plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory import (
    GPU_RUNTIME_BYTES,
    STEP_COPIES,
    CachedFrames,
    _layer_peak,
    codec_bytes,
    memory_plan,
    most_cached_frames,
    workload_of,
)
from dualparal.planning.memory_table import MemoryPlan, format_plan
from dualparal.planning.placement import ModelSizes, Placement
from dualparal.planning.sizes import (
    PUBLISHED_MODELS,
    UMT5_XXL,
    VAE_2_1,
    VAE_2_2,
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
    DiTSizes,
    VaeSizes,
    umt5_float32_parameters,
    umt5_parameters,
)
from dualparal.planning.work import Workload, layer_flops
from dualparal.presets import USUAL, Preset, complete, load_presets
from dualparal.request import Settings
from tests.settings import settings

TINY = {**WAN_14B, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "text_dim": 16,
        "freq_dim": 8, "in_channels": 4, "out_channels": 4}  # fmt: skip
ODD = {**TINY, "patch_size": (1, 4, 4), "cross_attn_norm": False, "out_channels": 6}
GIB = 2**30


def request(**values: Any) -> Settings:
    """Settings like the presets': 40 latents at 480p unless told otherwise."""
    defaults = {
        "prompt": "x", "negative_prompt": "", "latents_num": 40, "height": 480, "width": 832, "fps": 16, "seed": 0,
        "num_inference_steps": 50, "guidance_scale": 5.0, "guidance_scale_2": 5.0, "flow_shift": 3.0, "num_per_block": 8,
        "num_cat": 8, "schedule": "paper",
    }  # fmt: skip
    return settings(**{**defaults, **values})


def plan_14b(ranks: int = 4, **values: Any) -> MemoryPlan:
    asked = request(**values)
    return memory_plan(workload_of(asked, WAN_14B, [40 // ranks] * ranks), height=asked.height, width=asked.width)


# Sizes


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B, WAN_5B, TINY, ODD], ids=["1.3B", "14B", "5B", "tiny", "odd"])
def test_parameters_of_every_share_equal_the_real_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    sizes, owners = DiTSizes.of(config), transformer_owners(config)
    num_layers = sizes.num_layers
    for layers in (range(num_layers), range(1), range(1, num_layers - 1), range(num_layers - 1, num_layers)):
        owned = set(layers)
        owned |= {-1} if layers.start == 0 else set()
        owned |= {num_layers} if layers.stop == num_layers else set()
        mine = {key: value for key, value in model.named_parameters() if owners[key] in owned}
        float32 = sum(value.numel() for key, value in mine.items() if keeps_float32(key))
        assert sizes.share(layers).float32 == float32
        assert sizes.share(layers).count == sum(value.numel() for value in mine.values())
        assert sizes.share(layers).num_bytes("bfloat16") == 2 * sizes.share(layers).count + 2 * float32


def test_parameters_known_by_heart() -> None:
    assert DiTSizes.of(WAN_1_3B).share(range(30)).count == 1_418_996_800
    assert DiTSizes.of(WAN_14B).share(range(40)).count == 14_288_491_584
    assert DiTSizes.of(WAN_14B).layer.count == 351_394_304
    assert DiTSizes.of(WAN_5B).share(range(30)).count == 4_999_787_712


def test_missing_config_keys_have_diffusers_defaults() -> None:
    with torch.device("meta"):
        defaults = WanTransformer3DModel(num_layers=1)
    found = DiTSizes.of({"num_layers": 1, "out_channels": None})
    assert found.layer.count == sum(value.numel() for value in defaults.blocks[0].parameters())


@pytest.mark.parametrize(
    "config", [UMT5_XXL, {**UMT5_XXL, "vocab_size": 99, "d_model": 32, "d_kv": 8, "num_heads": 3, "d_ff": 20, "num_layers": 2}]
)
def test_text_encoder(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu"))
    assert umt5_parameters(config) == sum(value.numel() for value in model.parameters())
    kept = [
        value.numel() for name, value in model.named_parameters() if set(name.split(".")) & set(model._keep_in_fp32_modules)
    ]
    assert umt5_float32_parameters(config) == sum(kept) > 0


def test_tokens() -> None:
    assert DiTSizes.of(WAN_14B).tokens_per_frame(480, 832) == 1560
    assert DiTSizes.of(WAN_1_3B).tokens_per_frame(720, 1280) == 3600
    assert DiTSizes.of(ODD).tokens_per_frame(64, 96) == 2 * 3
    assert DiTSizes.of(WAN_5B).tokens_per_frame(704, 1280, VAE_2_2.spatial_factor) == 880


# Work


def test_flops_by_hand() -> None:
    sizes = DiTSizes.of(WAN_1_3B)
    n, m = 16 * 1560, 24 * 1560
    by_hand = 12 * n * 1536**2 + 4 * n * m * 1536 + 4 * n * 512 * 1536 + 4 * n * 1536 * 8960
    assert layer_flops(sizes, n, m, num_halves=1) == by_hand == 7_900_810_444_800
    assert layer_flops(sizes, n, m) == 2 * by_hand


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_layer(
    config: dict[str, Any], window: int, right: int, dtype: torch.dtype, watch: Any, has_token_times: bool = False
) -> int:
    """Run one real layer with our processors under `watch`, 2 guidance halves; returns the bytes of its input, each token's
    modulations among it where they differ."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    dim = heads * head_dim
    with default_dtype(dtype):
        block = WanTransformerBlock(dim, config["ffn_dim"], heads, "rms_norm_across_heads", True).requires_grad_(False)
    itself, cross = SelfAttention(0), CrossAttention({0: [torch.zeros(1, 512, dim, dtype=dtype)] * 2})
    block.attn1.set_processor(itself)
    block.attn2.set_processor(cross)
    rope = torch.zeros(window + right, head_dim // 2, dtype=torch.complex64)
    cache = {0: (torch.zeros(2, right, dim, dtype=dtype), torch.zeros(2, right, dim, dtype=dtype))} if right else None
    temb = torch.zeros(1, window, 6, dim, dtype=dtype) if has_token_times else torch.zeros(1, 6, dim, dtype=dtype)
    hidden = torch.zeros(2, window, dim, dtype=dtype)
    with torch.inference_mode():
        itself.surroundings = Surroundings(rope, right=cache and dict(cache))
        block(hidden, (0, None), temb, None)  # text K and V are kept from here on
        itself.surroundings = Surroundings(rope, right=cache and dict(cache))
        with watch:
            block(hidden, (0, None), temb, None)
    return hidden.nbytes + temb.nbytes * has_token_times


@pytest.mark.parametrize(("window", "right"), [(48, 24), (32, 0), (24, 40)])
def test_flops_equal_torchs_count(window: int, right: int) -> None:
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        run_layer(TINY, window, right, torch.float32, counter)
    assert counter.get_total_flops() == layer_flops(DiTSizes.of(TINY), window, window + right)


def test_flops_of_a_job_add_up() -> None:
    whole = workload_of(request(), WAN_14B, [40])
    split = workload_of(request(), WAN_14B, [13, 13, 14])
    assert whole.total_flops() == split.total_flops()
    item = whole.schedule.items[-1]  # the last block: 8 own latents, 8 of left context, nothing behind
    embed_and_head = 2 * 16 * 1560 * 64 * 5120 + 2 * 2 * 8 * 1560 * 64 * 5120
    assert whole.item_flops(item) == [40 * layer_flops(whole.sizes, 16 * 1560, 16 * 1560) + embed_and_head]
    assert sum(split.item_flops(item)) == whole.item_flops(item)[0]


def test_micro_batches_and_no_guidance_halve_the_work() -> None:
    both = workload_of(request(), WAN_1_3B, [15, 15])
    halves = workload_of(request(), WAN_1_3B, [15, 15], rules=Rules(micro_batches=True))
    single = workload_of(request(guidance_scale=1.0), WAN_1_3B, [15, 15])
    assert halves.total_flops() == pytest.approx(both.total_flops(), rel=1e-4)  # patches are embedded once for each half
    assert single.total_flops() == pytest.approx(both.total_flops() / 2, rel=1e-4)
    assert len(halves.schedule.items) == 2 * len(both.schedule.items)


def test_the_first_scale_decides_for_both_experts() -> None:
    """As diffusers' WanPipeline and our rank 0: the unconditional half runs iff `guidance_scale` > 1."""
    experts = (0,) * 10 + (1,) * 40
    for first, second, halves in ((1.0, 3.0, 1), (3.0, 1.0, 2), (3.0, 3.0, 2), (1.0, 1.0, 1)):
        asked = request(guidance_scale=first, guidance_scale_2=second)
        assert workload_of(asked, WAN_14B, [40], experts=experts).num_halves == halves


def test_forecast_scales_with_the_rate() -> None:
    workload = workload_of(request(), WAN_14B, [10] * 4)
    slow, fast = workload.forecast(1e14), workload.forecast(4e14)
    assert slow.total == pytest.approx(4 * fast.total)
    assert fast.first_block < fast.total
    assert fast.total > workload.total_flops() / 4 / 4e14
    late = workload.forecast(4e14, overhead_s=1.0)
    assert late.total > fast.total + len(workload.schedule.items)


def test_skipped_steps_cost_no_work_and_time_but_memory_for_what_they_are_extrapolated_from() -> None:
    rules = Rules(step_cache=StepCache(interval=2, max_order=1))
    whole, skipping = (workload_of(request(), WAN_14B, [10] * 4, rules=rules) for rules in (Rules(), rules))
    for item, computed in zip(skipping.schedule.items, whole.schedule.items, strict=True):
        assert (skipping.item_flops(item) == [0] * 4) == item.is_skipped
        assert item.is_skipped or item.right is not computed.right or skipping.item_flops(item) == whole.item_flops(computed)
    share = sum(not item.is_skipped for item in skipping.schedule.items) / len(whole.schedule.items)
    assert 0.5 < share < 0.56
    assert skipping.total_flops() == pytest.approx(share * whole.total_flops(), rel=0.02)  # neighbours that skip join windows
    slow, fast = (workload.forecast(4e14, overhead_s=1.0) for workload in (whole, skipping))
    assert fast.total < 0.7 * slow.total
    plan, more = (memory_plan(workload, height=480, width=832) for workload in (whole, skipping))
    copies = tensors_of_block(50, None) + STEP_COPIES
    assert more.ranks[0].latents * copies == plan.ranks[0].latents * (copies + 2)
    assert more.ranks[1].total > plan.ranks[1].total  # the latents of a neighbour that skips join the window
    repeating = workload_of(request(), WAN_14B, [40], rules=Rules(step_cache=StepCache(interval=2, max_order=0)))
    found = memory_plan(repeating, height=480, width=832).ranks[0].latents
    assert found * copies == plan.ranks[0].latents * (copies + 1)


def test_one_block_that_skips_needs_the_time_of_its_computed_steps() -> None:
    rules = Rules(step_cache=StepCache(interval=5, before=3))
    whole, skipping = (workload_of(request(latents_num=16), WAN_14B, [20] * 2, rules=r) for r in (Rules(), rules))
    computed = sum(not item.is_skipped for item in skipping.schedule.items)
    assert computed == 13
    assert skipping.forecast(4e14).total == pytest.approx(whole.forecast(4e14).total * computed / 50)
    assert memory_plan(skipping, height=480, width=832).ranks[1] == memory_plan(whole, height=480, width=832).ranks[1]


def test_layers_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up"):
        workload_of(request(), WAN_14B, [10] * 3)


# Memory


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside and alive at once, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self._now)
        return out

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
@pytest.mark.parametrize("num_cat", [8, 0])
def test_activations_of_a_real_layer(config: dict[str, Any], dtype: str, num_cat: int) -> None:
    """At true size, on fake tensors: no memory is used."""
    asked = request(num_cat=num_cat)
    workload = workload_of(asked, config, [config["num_layers"]])
    peak = Peak()
    with FakeTensorMode():
        held = run_layer(config, (8 + num_cat) * 1560, num_cat * 1560, getattr(torch, dtype), peak)
    counted = memory_plan(workload, height=480, width=832, dtype=dtype).ranks[0].activations
    assert 0.99 * (peak.most + held) <= counted <= 1.01 * (peak.most + held)


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
def test_a_layers_neighbours_are_gone_before_its_largest_moment(config: dict[str, Any]) -> None:
    """Both neighbours' K and V come in, as many of its own stay: in attention one pair of the two is there."""
    workload = workload_of(request(latents_num=32), config, [config["num_layers"]], rules=Rules(context="cached"))
    peak, dim, side = Peak(), config["num_attention_heads"] * 128, 8 * 1560
    with FakeTensorMode(), torch.inference_mode(), default_dtype(torch.bfloat16):
        block = WanTransformerBlock(dim, config["ffn_dim"], dim // 128, "rms_norm_across_heads", True)
        itself, cross = SelfAttention(0), CrossAttention({0: [torch.zeros(1, 512, dim)] * 2})
        block.attn1.set_processor(itself)
        block.attn2.set_processor(cross)
        block(*_quiet(itself, dim), torch.zeros(1, 6, dim), None)  # text K and V are kept from here on
        rope, temb = torch.zeros(3 * side, 64, dtype=torch.complex64), torch.zeros(1, 6, dim)
        with peak:
            left, right = ({0: (torch.zeros(2, side, dim), torch.zeros(2, side, dim))} for _ in range(2))
            itself.surroundings = Surroundings(rope, left=left, right=right, head=slice(0, side), tail=slice(0, side))
            block(torch.zeros(2, side, dim), (0, None), temb, None)
    inner = next(item for item in workload.schedule.items if item.left is item.right is Context.CACHE)
    counted = _layer_peak(workload, inner, 2, 0) + 2 * 2 * 2 * side * dim * 2  # head and tail, K and V, halves, bfloat16
    assert 0.99 * peak.most <= counted <= 1.01 * peak.most


def _quiet(itself: SelfAttention, dim: int) -> tuple[torch.Tensor, tuple[int, None]]:
    itself.surroundings = Surroundings(torch.zeros(8, 64, dtype=torch.complex64))
    return torch.zeros(2, 8, dim), (0, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_behind_a_clean_picture(dtype: str) -> None:
    """One block, whose tokens are modulated one by one."""
    asked = request(latents_num=9, height=704, width=1280, start_image="a digest")
    workload = workload_of(asked, WAN_5B, [30], spatial_factor=VAE_2_2.spatial_factor)
    peak = Peak()
    with FakeTensorMode():
        held = run_layer(WAN_5B, 9 * 880, 0, getattr(torch, dtype), peak, has_token_times=True)
    plain, counted = (
        memory_plan(workload, height=704, width=1280, dtype=dtype, has_clean_start=is_clean).ranks[0].activations
        for is_clean in (False, True)
    )
    assert plain < peak.most + held <= counted <= 1.3 * (peak.most + held)
    model = ModelSizes.published("Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    assert model is not None
    plans = [
        plan_job(asked.model_copy(update={"start_image": found}), model, Placement(layers=(30,), dtype=dtype))
        for found in ("x", None)
    ]
    assert plans[0].memory.ranks[0].activations > plans[1].memory.ranks[0].activations


def test_feature_cache_by_hand() -> None:
    """METHOD.md's numbers: 4.6 GB for 1.3B and 20.4 GB for 14B per set of K and V."""
    for config, gigabytes in ((WAN_1_3B, 4.6), (WAN_14B, 20.4)):
        workload = workload_of(request(), config, [config["num_layers"]])
        assert most_cached_frames(workload).kept == 8 * 2
        found = memory_plan(workload, height=480, width=832).ranks[0].feature_cache
        assert found == 2 * 2 * 8 * 1560 * config["num_attention_heads"] * 128 * config["num_layers"] * 2
        assert found / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("values", "rules", "frames"),
    [
        ({"latents_num": 16}, Rules(), 0),  # one block
        ({"latents_num": 24}, Rules(), 8 * 2),  # two: only the first uses what the second left
        ({"latents_num": 27}, Rules(), 8 * 2),
        ({"num_cat": 0}, Rules(), 0),
        ({"num_cat": 4}, Rules(), 4 * 2),
        ({"guidance_scale": 1.0}, Rules(), 8),
        ({"num_inference_steps": 1}, Rules(), 0),  # blocks never meet
        ({}, Rules(micro_batches=True), 2 * 8),  # one for each half
    ],
)
def test_cached_frames(values: dict[str, Any], rules: Rules, frames: int) -> None:
    asked = request(**values)
    assert most_cached_frames(workload_of(asked, TINY, [3], rules=rules)) == CachedFrames(frames)


def test_cached_left_context_grows_with_the_blocks_in_flight() -> None:
    few, many = (
        most_cached_frames(workload_of(request(latents_num=80), TINY, [3], rules=rules)).kept
        for rules in (Rules(left_context="own_step", context="cached", max_in_flight=3, stagger=16), Rules(context="cached"))
    )
    assert most_cached_frames(workload_of(request(latents_num=80), TINY, [3])).kept < few < many
    assert few <= (3 + 1) * 8 * 2 + 2 * 8 * 2


def test_weights_are_shared_out() -> None:
    one, four = plan_14b(1), plan_14b(4)
    assert sum(rank.weights for rank in four.ranks) == one.ranks[0].weights
    assert one.ranks[0].weights == 2 * 14_288_491_584 + 2 * DiTSizes.of(WAN_14B).share(range(40)).float32
    assert max(rank.weights for rank in four.ranks) < one.ranks[0].weights / 3.7
    both = memory_plan(workload_of(request(), WAN_14B, [40]), height=480, width=832, num_experts=2)
    assert both.ranks[0].weights == 2 * one.ranks[0].weights


def test_memory_does_not_grow_with_length_but_for_latents() -> None:
    """`paper` holds every block in flight, at most one per step."""
    short, long, longer = (plan_14b(latents_num=length) for length in (80, 420, 2000))
    for attribute in ("weights", "feature_cache", "activations", "messages", "text"):
        assert getattr(short.ranks[0], attribute) == getattr(longer.ranks[0], attribute)
    assert short.ranks[0].latents < long.ranks[0].latents == longer.ranks[0].latents
    assert short.ranks[1] == longer.ranks[1]


def test_uneven_layers_and_the_rows_they_show() -> None:
    workload = workload_of(request(), WAN_1_3B, [20, 9, 1])
    plan = memory_plan(workload, height=480, width=832, codec_rank=2)
    assert plan.most == plan.ranks[2].total > plan.ranks[0].total
    assert plan.ranks[2].codec == plan.codec
    assert plan.ranks[0].codec == 0
    text = format_plan(plan)
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [["0", "20"], ["1", "9"], ["2", "1"]]
    assert "included above" in text
    assert f"{plan.ranks[0].total / 1e9:.2f}" in text
    assert "on a device of its own" in format_plan(plan_14b())


def test_refusal_names_rank_and_numbers() -> None:
    plan = plan_14b(2)
    assert plan.refusal(80 * GIB) is None
    assert plan.refusal(24 * GIB) == (
        f"rank 0 needs {plan.most / 1e9:.1f} GB and has 25.8 GB; use more ranks, a smaller picture, or a smaller num_per_block "
        "or num_cat"
    )


def test_cpu_has_no_gpu_runtime() -> None:
    workload = workload_of(request(), WAN_1_3B, [30])
    gpu, cpu = (memory_plan(workload, height=480, width=832, on_gpu=on_gpu) for on_gpu in (True, False))
    assert gpu.most - cpu.most == GPU_RUNTIME_BYTES


def test_switch_between_experts_needs_the_larger_window() -> None:
    one = workload_of(request(), WAN_14B, [40])
    two = workload_of(request(), WAN_14B, [40], experts=(0,) * 12 + (1,) * 38)
    one_plan, two_plan = (memory_plan(work, height=480, width=832).ranks[0] for work in (one, two))
    assert two_plan.activations > one_plan.activations  # the right neighbour's latents join the window
    assert two_plan.messages == one_plan.messages * 24 // 16


@pytest.mark.parametrize("sizes", [VAE_2_1, VAE_2_2], ids=["2.1", "2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_by_the_real_vae(dtype: torch.dtype, sizes: VaeSizes) -> None:
    """At a small size, on fake tensors: the peak of a streamed decode, which follows the VAE's dtype."""
    height, width = 128, 192
    with FakeTensorMode(), default_dtype(dtype):
        vae = AutoencoderKLWan(**sizes.config).eval().requires_grad_(False)
        assert sum(value.numel() for value in vae.parameters()) == sizes.parameters
        assert vae.config.scale_factor_spatial == sizes.spatial_factor
        decoder, peak = StreamingDecoder(vae), Peak()
        with peak:
            for _ in range(3):  # the first frames fill the caches
                decoder.decode(torch.zeros(1, decoder.z_dim, 1, height // sizes.spatial_factor, width // sizes.spatial_factor))
    planned = height * width * sizes.decoding_bytes_per_pixel(str(dtype).removeprefix("torch."))
    assert peak.most <= planned <= 1.06 * peak.most


def test_codec_bytes() -> None:
    schedule = make_schedule(Rules(), BlockPlan.of(40, 8, 8), (0,) * 50)
    default = codec_bytes(schedule, 480, 832, "bfloat16")
    assert default / 1e9 == pytest.approx(2 * 5.68 + 0.5 + 8.1 + 1.0, abs=0.2)
    tiny = codec_bytes(schedule, 480, 832, "bfloat16", text_encoder_bytes=5, vae=replace(VAE_2_1, parameters=7))
    assert default - tiny == 2 * umt5_parameters() + 4 * VAE_2_1.parameters - 5 - 28
    half = codec_bytes(schedule, 480, 832, "bfloat16", vae_dtype="bfloat16")
    assert default - half == 2 * VAE_2_1.parameters + 480 * 832 * (53 * 4 - 55 * 2) * 96


@pytest.mark.parametrize("preset", [preset for preset in load_presets().values() if preset.model in PUBLISHED_MODELS])
def test_hardware_lines_of_the_presets_are_true(preset: Preset) -> None:
    """Every "N GPUs with M GB" holds the preset's own request, the codec on a spare card or on the last rank's."""
    model = ModelSizes.published(preset.model)
    assert model is not None
    asked = complete(USUAL, preset, num_experts=model.num_experts)
    claims = re.findall(r"(\d+) GPUs? with (\d+) GB", preset.hardware)
    assert len(claims) >= 2

    def fits(ranks: int, has_spare: bool, bytes_per_device: int) -> bool:
        placement = Placement(
            layers=tuple(len(stage) for stage in split_layers(model.config["num_layers"], ranks)), dtype=preset.dtype,
            vae_dtype=preset.vae_dtype, codec_rank=None if has_spare else ranks - 1, bytes_per_device=bytes_per_device,
            text_encoder="auto",
        )  # fmt: skip
        return plan_job(asked, model, settle_text_encoder(asked, model, placement)).refusal is None

    for number, gigabytes in ((int(number), int(size)) for number, size in claims):
        shared, spare = fits(number, False, gigabytes * 10**9), number > 1 and fits(number - 1, True, gigabytes * 10**9)
        assert shared or spare, (number, gigabytes)


def test_a_plan_is_quick_for_a_long_job() -> None:
    workload = workload_of(request(latents_num=1200), WAN_14B, [5] * 8)
    assert isinstance(workload, Workload)
    assert len(workload.schedule.items) == 149 * 50
    memory_plan(workload, height=480, width=832)
    assert workload.forecast(1e15).total > 0
