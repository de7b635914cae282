"""What a job will hold in memory, rank by rank, before anything is loaded.

Weights, caches, text and messages are exact counts; activations follow the largest moment of a layer as diffusers' code and
our attention processors run it (written out at `_layer_peak`; a test compares it with the real layers). Everything is derived
from the schedule's items. Pure arithmetic, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualparal.method.borders import tensors_of_block
from dualparal.method.grid import Ring
from dualparal.method.rules import plan_of
from dualparal.method.schedule import Context, Item, Rules, Schedule
from dualparal.planning.memory_table import MemoryPlan, RankMemory
from dualparal.planning.schedules import schedule_of
from dualparal.planning.sizes import DTYPE_BYTES, VAE_2_1, DiTSizes, VaeSizes, umt5_parameters
from dualparal.planning.work import Workload, query_and_key_frames
from dualparal.request import Settings

GPU_RUNTIME_BYTES = 10**9  # CUDA context, library workspaces, allocator slack: the same on every card
CODEC_RUNTIME_BYTES = 5 * 10**8  # the same of a second process on a card
CACHED_LAYERS_ON_DEVICE = 5  # of a left cache that waits in host memory: three on their way out, two on their way in
STEP_COPIES = 2  # of a block in flight on rank 0, beside what it consists of: the step's own
FRAME_BYTES_PER_PIXEL = 3 * (4 + 4 + 4 + 1)  # decoded frames of a block: pieces, joined, clamped; then uint8


def workload_of(
    request: Settings,
    config: Mapping[str, Any],
    layers: Sequence[int],
    *,
    rules: Rules | None = None,
    experts: Sequence[int] | None = None,
    text_tokens: int = 512,
    spatial_factor: int = VAE_2_1.spatial_factor,
) -> Workload:
    """The work of a resolved `request` with a transformer's `config`, `layers[r]` of its layers on rank r.

    `experts[s]` is the expert that runs step s; all 0 by default. `rules` default to the paper's. `spatial_factor` is the
    VAE's.
    """
    sizes = DiTSizes.of(config)
    if sum(layers) != sizes.num_layers:
        raise ValueError(f"{list(layers)} layers do not add up to the model's {sizes.num_layers}")
    plan = plan_of(request)
    return Workload(
        sizes=sizes,
        schedule=schedule_of(rules or Rules(), plan, tuple(experts or (0,) * request.num_inference_steps)),
        layers=tuple(layers),
        tokens_per_frame=sizes.tokens_per_frame(request.height, request.width, spatial_factor),
        num_halves=2 if request.has_guidance else 1,  # for both experts, as diffusers has it
        text_tokens=text_tokens,
    )


def memory_plan(
    workload: Workload,
    *,
    height: int,
    width: int,
    dtype: str = "bfloat16",
    num_experts: int = 1,
    codec_rank: int | None = None,
    text_encoder_bytes: int | None = None,
    vae: VaeSizes = VAE_2_1,
    vae_dtype: str = "float32",
    num_texts: int = 1,
    on_gpu: bool = True,
    quantization: str | None = None,
    is_offloaded: bool = False,
    is_cache_offloaded: bool = False,
    lora_elements: int = 0,
    has_clean_start: bool = False,
    rings: Sequence[Ring] = (None,),
) -> MemoryPlan:
    """The memory of every rank for `workload` at `height` x `width` pixels.

    `codec_rank`: the rank whose device the codec shares, None when it has its own. `text_encoder_bytes` are UMT5-XXL's in
    `dtype` by default; the `vae` is held in `vae_dtype`, which also decides the room that decoding takes. `num_texts`:
    different texts that blocks in flight listen to. `quantization`: fp8 or int8. `is_offloaded`: layers wait in host memory,
    two at a time are on the device; `is_cache_offloaded`: so do the K and V of left neighbours, `CACHED_LAYERS_ON_DEVICE`
    layers of one block's at a time. `lora_elements`: numbers of the video's LoRAs, all layers and experts together.
    `has_clean_start`: the picture that the film begins with is clean, so that block 0's tokens are modulated one by one.
    `rings`: each has the stages once (`method.grid`).
    """
    sizes, schedule, width_bytes = workload.sizes, workload.schedule, DTYPE_BYTES[dtype]
    ends = [sum(workload.layers[: rank + 1]) for rank in range(len(workload.layers))]
    stages = [range(end - count, end) for end, count in zip(ends, workload.layers, strict=True)]
    per_cached_frame = 2 * workload.tokens_per_frame * sizes.dim * width_bytes  # K and V, per layer and guidance half
    cached = {ring: most_cached_frames(workload, ring, is_offloaded=is_cache_offloaded) for ring in rings}
    unpacked = _unpacked_bytes(sizes, width_bytes, quantization)
    items = {ring: _distinct(workload, ring) for ring in rings}
    peaks = {ring: max((_layer_peak(workload, it, width_bytes, unpacked) for it in items[ring]), default=0) for ring in rings}
    token_times = _token_times_bytes(workload, width_bytes) if has_clean_start else 0
    messages = {ring: max((_hidden_bytes(workload, it, width_bytes) for it in items[ring]), default=0) for ring in rings}
    travelling = num_experts * workload.text_tokens * sizes.dim * width_bytes if num_texts > 1 else 0  # with the activations
    codec = codec_bytes(schedule, height, width, dtype, text_encoder_bytes, vae, vae_dtype)
    ranks = tuple(
        RankMemory(
            weights=_weights_bytes(sizes, stage, dtype, quantization, num_experts, is_offloaded),
            loras=-(-lora_elements * len(stage) // sizes.num_layers) * width_bytes,
            feature_cache=cached[ring].on_device(len(stage)) * per_cached_frame,
            activations=peaks[ring] + token_times,
            messages=_messages(rank % len(stages), len(stages)) * (messages[ring] + travelling),
            text=_text_bytes(workload, len(stage), width_bytes, num_texts, len(rings)) * num_experts + _rope_bytes(workload),
            latents=_latents_bytes(workload) if rank == 0 else 0,
            codec=codec if rank == codec_rank else 0,
            runtime=(GPU_RUNTIME_BYTES + CODEC_RUNTIME_BYTES * (rank == codec_rank)) * on_gpu,
        )
        for rank, (ring, stage) in enumerate((ring, stage) for ring in rings for stage in stages)
    )
    num_layers = sum(workload.layers)
    host = sizes.pinned_layer_bytes(dtype, quantization) * num_layers * num_experts * len(rings) if is_offloaded else 0
    in_host = sum(one.in_host for one in cached.values())
    return MemoryPlan(ranks, workload.layers * len(rings), codec, host, in_host * per_cached_frame * num_layers)


def _weights_bytes(
    sizes: DiTSizes, stage: range, dtype: str, quantization: str | None, num_experts: int, is_offloaded: bool
) -> int:
    """Weights of one rank on its device: of offloaded layers the one that runs and the next."""
    layer, whole = sizes.layer.num_bytes(dtype, quantization), sizes.share(stage).num_bytes(dtype, quantization)
    if not is_offloaded:
        return whole * num_experts
    return (whole - layer * len(stage)) * num_experts + layer * min(2, len(stage))


def _unpacked_bytes(sizes: DiTSizes, width_bytes: int, quantization: str | None) -> int:
    """The largest matrix of a layer in the stage's dtype, which is there while it is multiplied."""
    return sizes.ffn_dim * sizes.dim * width_bytes if quantization else 0


@dataclass(frozen=True)
class CachedFrames:
    """Most latent frames x guidance halves whose K and V a layer holds at once: `kept` on the device from item to item,
    `in_host` in host memory, of which `moving` at most come or go with one item."""

    kept: int
    in_host: int = 0
    moving: int = 0

    def on_device(self, num_layers: int) -> int:
        """Frames x halves x layers on the device of a rank with `num_layers`."""
        return self.kept * num_layers + self.moving * CACHED_LAYERS_ON_DEVICE


def most_cached_frames(workload: Workload, ring: Ring = None, *, is_offloaded: bool = False) -> CachedFrames:
    """The most that a stage of `ring` holds between two items (a layer drops what it uses before it leaves anything behind),
    left caches in host memory when `is_offloaded`."""
    plan = workload.schedule.plan
    heads: dict[int | None, int] = {}
    tails: dict[tuple[int, int | None], int] = {}
    most = most_heads = most_tails = moving = 0
    for item in workload.schedule.on_ring(ring):
        halves = workload.halves_of(item)
        heads.pop(item.half, None)
        if item.left is Context.CACHE and item.frees_left:
            del tails[item.block - 1, item.half]
        if item.keeps_head:
            heads[item.half] = plan.num_kept(item.block) * halves
        replaced = tails.get((item.block, item.half), 0) if item.keeps_tail else 0
        if item.keeps_tail:
            tails[item.block, item.half] = plan.num_left(item.block + 1) * halves
        in_tails = replaced + sum(tails.values())
        most = max(most, in_tails + sum(heads.values()))
        most_heads, most_tails = max(most_heads, sum(heads.values())), max(most_tails, in_tails)
        moving = max(moving, *tails.values(), 0)
    return CachedFrames(most_heads, most_tails, moving) if is_offloaded else CachedFrames(most)


def codec_bytes(
    schedule: Schedule,
    height: int,
    width: int,
    dtype: str,
    text_encoder_bytes: int | None = None,
    vae: VaeSizes = VAE_2_1,
    vae_dtype: str = "float32",
) -> int:
    """Text encoder, VAE, and the decoding of the longest block in `vae_dtype`."""
    text = umt5_parameters() * DTYPE_BYTES[dtype] if text_encoder_bytes is None else text_encoder_bytes
    num_frames = max(len(schedule.plan.frames(block)) for block in range(schedule.plan.num_blocks))
    per_pixel = vae.decoding_bytes_per_pixel(vae_dtype) + FRAME_BYTES_PER_PIXEL * num_frames
    return text + vae.num_bytes(vae_dtype) + height * width * per_pixel


def _distinct(workload: Workload, ring: Ring) -> list[Item]:
    """One item of each shape that takes that ring: a long job has thousands of items and a handful of shapes."""
    schedule, plan = workload.schedule, workload.schedule.plan
    sizes = [(plan.num_left(block), plan.lengths[block], plan.num_right(block)) for block in range(plan.num_blocks)]
    alike: dict[tuple[tuple[int, int, int], Context, Context, int], Item] = {}
    for item in schedule.on_ring(ring):
        alike[sizes[item.block], item.left, item.right, workload.halves_of(item)] = item
    found = {(*query_and_key_frames(schedule, item), workload.halves_of(item)): item for item in alike.values()}
    return list(found.values())


def _hidden_bytes(workload: Workload, item: Item, width_bytes: int) -> int:
    """The activations [B, n, D] that travel between stages."""
    window, _ = query_and_key_frames(workload.schedule, item)
    return workload.halves_of(item) * window * workload.tokens_per_frame * workload.sizes.dim * width_bytes


def _layer_peak(workload: Workload, item: Item, width_bytes: int, unpacked: int) -> int:
    """Bytes alive at the worst moment of a layer, all tensors [B, tokens, D] counted in the stage's dtype or in float32.

    Rotating K: the layer's input, its norm, q, rotated q (queries); k, v, rotated k (keys); k in float32 and its product
    with the rotation. Attention: the same without float32, and its output. Feed-forward: the layer's input, the state after
    attention, the text's share, norm, and the inner tensor before and after GELU. Residual: the same with the output for the
    inner tensors, and state, output and their sum in float32. In a float32 model casts make no copies. `unpacked` bytes of an
    8-bit matrix are there while it is multiplied, beside its input and output.
    """
    window, keys = query_and_key_frames(workload.schedule, item)
    per_token = workload.halves_of(item) * workload.tokens_per_frame * workload.sizes.dim
    queries, seen, cast = window * per_token, keys * per_token, int(width_bytes != 4)
    rotating = (4 * queries + (2 + cast) * seen) * width_bytes + (1 + cast) * seen * 4
    attention = (5 * queries + 3 * seen) * width_bytes
    inner = queries * workload.sizes.ffn_dim // workload.sizes.dim
    feed_forward = max((4 * queries + 2 * inner) * width_bytes, (5 * queries + inner) * width_bytes + unpacked)
    residual = 5 * queries * width_bytes + (1 + 2 * cast) * queries * 4
    return max(rotating, attention, feed_forward, residual)


def _token_times_bytes(workload: Workload, width_bytes: int) -> int:
    """Block 0's modulations [1, n, 6, D] in the stage's dtype, cast to float32, and added to a layer's own."""
    schedule = workload.schedule
    window = max(sum(schedule.window_frames(item)) for item in schedule.items if item.block == 0 and not item.is_skipped)
    return window * workload.tokens_per_frame * 6 * workload.sizes.dim * (width_bytes + 8)


def _messages(rank: int, num_ranks: int) -> int:
    """Activations [B, n, D] held for the ring: the one being worked on, the next one awaited, two being sent
    (`transport.MAX_UNSENT`), one free to be filled. Rank 0 receives none, the last rank sends none."""
    if num_ranks == 1:
        return 1
    return 3 if rank in (0, num_ranks - 1) else 5


def _text_bytes(workload: Workload, num_layers: int, width_bytes: int, num_texts: int, num_rings: int) -> int:
    """Per expert: the projected texts, their K and V in every layer (of the ring's own halves), and the time projections of all
    steps."""
    dim = workload.sizes.dim
    one = workload.num_halves * workload.text_tokens * dim * width_bytes
    times = workload.schedule.num_steps * dim * (6 * width_bytes + 4)
    halves = -(-workload.num_halves // num_rings)
    return num_texts * (one + one * halves // workload.num_halves * 2 * num_layers) + times


def _rope_bytes(workload: Workload) -> int:
    plan = workload.schedule.plan
    most = max(plan.num_left(b) + plan.lengths[b] + plan.num_right(b) for b in range(plan.num_blocks))
    return most * workload.tokens_per_frame * workload.sizes.dim // workload.sizes.num_heads // 2 * 8  # complex64


def _latents_bytes(workload: Workload) -> int:
    frame = workload.sizes.in_channels * workload.tokens_per_frame * math.prod(workload.sizes.patch_size) * 4
    longest = max(workload.schedule.plan.lengths)
    copies = tensors_of_block(workload.schedule.num_steps, workload.schedule.max_order) + STEP_COPIES
    return workload.schedule.num_in_flight() * longest * frame * copies
