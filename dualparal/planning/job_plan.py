"""What a job needs and how long it takes on given devices, before anything is downloaded or loaded.

One answer for the `plan` command, the page's estimate and the engine's refusal. It puts together the block plan, the schedule,
`estimate` (bytes) and `work` (FLOPs through the event model). Pure arithmetic: no torch, no clock, no device is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from dualparal.method.event_model import Forecast, ItemCost, forecast
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Item
from dualparal.method.timeline import most_texts, text_plan
from dualparal.planning.layer_split import StepTimes, fastest_split
from dualparal.planning.memory import memory_plan, workload_of
from dualparal.planning.memory_table import MemoryPlan, gigabytes
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.schedules import experts_by_step, shortened
from dualparal.planning.sizes import DTYPE_BYTES
from dualparal.planning.work import Workload
from dualparal.request import Settings


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """The needs of one completed request on one placement; times are None without a `speed`. `way_out`: flags with which it
    would fit, where it does not and somebody has looked for them."""

    request: Settings
    placement: Placement
    workload: Workload
    memory: MemoryPlan
    speed: Speed | None = None
    way_out: str | None = None

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of the rank that needs most."""
        return self.memory.most

    @property
    def bytes_in_all(self) -> int:
        """Bytes of every rank and the codec together: what a host needs that runs them all on its CPU."""
        shared = any(rank.codec for rank in self.memory.ranks)
        return sum(rank.total for rank in self.memory.ranks) + (0 if shared else self.memory.codec)

    @property
    def refusal(self) -> str | None:
        """One sentence with the numbers when it does not fit, None when it does or the memory is not known."""
        sentence = self._shortage
        return sentence if sentence is None or self.way_out is None else f"{sentence}; it would fit with {self.way_out}"

    @property
    def _shortage(self) -> str | None:
        have = self.placement.bytes_per_device
        if have is None:
            return None
        if not self.placement.on_gpu:
            if self.bytes_in_all <= have:
                return None
            return (
                f"all ranks together need {gigabytes(self.bytes_in_all)} and this host has {gigabytes(have)}; use a smaller "
                "picture, or a smaller num_per_block or num_cat"
            )
        if (sentence := self.memory.refusal(have)) is not None:
            return sentence
        if self.memory.codec > have:
            return (
                f"the codec needs {gigabytes(self.memory.codec)} and its GPU has {gigabytes(have)}; use a smaller picture or "
                "a smaller num_per_block"
            )
        return None

    @cached_property
    def forecast(self) -> Forecast | None:
        """When each block is denoised."""
        if self.speed is None:
            return None
        return forecast(self.workload.schedule, len(self.placement.layers), self.cost, rings=self.placement.guidance)

    @cached_property
    def work(self) -> float:
        """FLOPs that follow one another until the last block is denoised: everything that the schedule runs, on the rank that
        it waits for. The unit of what is learnt from made videos (`planning.learnt`)."""
        return self._in_flops.total

    @property
    def first_share(self) -> float:
        """Share of `work` that is done when the first block is denoised."""
        return self._in_flops.block_done[0] / self.work

    @cached_property
    def _in_flops(self) -> Forecast:
        unit = replace(self, speed=None)
        return forecast(self.workload.schedule, len(self.placement.layers), unit.cost, rings=self.placement.guidance)

    def step_times(self, item: Item) -> StepTimes:
        """Where the seconds of `item` go; FLOPs where no speed is known. Decoding is spread over a block's steps."""
        speed, workload, request = self.speed or Speed(flops_per_s=1.0), self.workload, self.request
        first, last = workload.embed_flops(item) / speed.flops_per_s, workload.head_flops(item) / speed.flops_per_s
        if speed.embed_s_per_token is not None:
            first = speed.embed_s_per_token * workload.window_tokens(item)
        if speed.head_s_per_token is not None:
            last = speed.head_s_per_token * workload.own_tokens(item) * workload.halves_of(item)
        num_latents = workload.schedule.plan.lengths[item.block] * item.is_whole
        is_run = not item.is_skipped
        return StepTimes(
            layer=max(workload.layer_flops(item) / speed.flops_per_s, self._link_s(item)) * is_run,
            first=first * is_run + speed.sampler_s * item.is_whole,
            last=last * is_run,
            decode=speed.decode_s_per_pixel * request.height * request.width * num_latents / workload.schedule.num_steps,
        )

    def _link_s(self, item: Item) -> float:
        """Seconds that what waits in host memory is on its way for one layer: copies run beside the layer before."""
        placement, workload = self.placement, self.workload
        if self.speed is None or self.speed.link_bytes_per_s is None:
            return 0.0
        sizes = workload.sizes
        per_frame = 2 * workload.tokens_per_frame * sizes.dim * DTYPE_BYTES[placement.dtype]
        comes, goes = (frames * per_frame * placement.is_cache_offloaded for frames in workload.moved_frames(item))
        comes += sizes.layer.num_bytes(placement.dtype, placement.quantization) * placement.is_offloaded
        return max(comes, goes) / self.speed.link_bytes_per_s

    @cached_property
    def cost(self) -> ItemCost:
        """Seconds that a rank works for an item, its share of other work on its device included."""
        known: dict[tuple[int, ...], list[float]] = {}

        def seconds(item: Item, rank: int) -> float:
            shape = (*self.workload.shape_of(item), *self.workload.moved_frames(item), item.is_whole, item.is_skipped)
            if shape not in known:
                known[shape] = self.step_times(item).of_ranks(
                    self.placement.layers, self.placement.codec_rank, self.placement.guidance
                )
            return known[shape][rank]

        return seconds

    @cached_property
    def block_shown(self) -> tuple[float, ...] | None:
        """Seconds after which each block is decoded. The codec works beside the stages, one block after another."""
        forecast, speed, request = self.forecast, self.speed, self.request
        if forecast is None or speed is None:
            return None
        per_latent_s = speed.decode_s_per_pixel * request.height * request.width
        shown, at = [], 0.0
        for done, length in zip(forecast.block_done, self.workload.schedule.plan.lengths, strict=True):
            at = max(at, done) + per_latent_s * length
            shown.append(at)
        return tuple(shown)

    @property
    def first_frames_s(self) -> float | None:
        return self.block_shown[0] if self.block_shown else None

    @property
    def total_s(self) -> float | None:
        return self.block_shown[-1] if self.block_shown else None

    @cached_property
    def sweep_s(self) -> float | None:
        """Seconds of the longest sweep: what the slowest stage works in it."""
        if self.speed is None:
            return None
        grid = self.placement.grid
        sweeps: dict[int, list[float]] = {}
        for item in self.workload.schedule.items:
            worked = sweeps.setdefault(item.sweep, [0.0] * grid.ranks)
            for rank in range(grid.ranks):
                worked[rank] += self.cost(item, rank) * item.is_on(grid.ring_of(rank))
        return max(max(worked) for worked in sweeps.values())

    @property
    def num_frames(self) -> int:
        return self.request.num_frames


def plan_job(
    request: Settings, model: ModelSizes, placement: Placement, *, speed: Speed | None = None, is_short: bool = False
) -> JobPlan:
    """The plan of a completed request.

    `is_short` looks at the job's first blocks only, as many as decide its memory: quick for a long video, but without times.
    """
    looked_at = shortened(request) if is_short else request
    workload = workload_of(
        looked_at, model.config, placement.layers, rules=rules_of(looked_at),
        experts=experts_by_step(request) if model.num_experts > 1 else None, spatial_factor=model.vae.spatial_factor,
    )  # fmt: skip
    return JobPlan(
        request=request, placement=placement, workload=workload, memory=_memory(workload, request, model, placement),
        speed=None if is_short else speed,
    )  # fmt: skip


def _memory(workload: Workload, request: Settings, model: ModelSizes, placement: Placement) -> MemoryPlan:
    text_bytes = model.text_bytes(placement.dtype)
    vae_bytes = model.vae.num_bytes(placement.vae_dtype)
    plan = memory_plan(
        workload, height=request.height, width=request.width, dtype=placement.dtype, num_experts=model.num_experts,
        codec_rank=placement.codec_rank, text_encoder_bytes=0, vae=model.vae, num_texts=_num_texts(workload, request),
        vae_dtype=placement.vae_dtype, on_gpu=placement.on_gpu, quantization=placement.quantization,
        is_offloaded=placement.is_offloaded, is_cache_offloaded=placement.is_cache_offloaded, rings=placement.grid.rings,
        lora_elements=model.elements_of(request.loras),
        has_clean_start=model.has_token_times and request.start_image is not None,
    )  # fmt: skip
    # Encoding and decoding never happen at once: a text encoder that leaves the device makes room for the decoder's work.
    is_kept = placement.text_encoder == "keep" or (not placement.on_gpu and placement.text_encoder == "cpu")
    decoding = plan.codec - vae_bytes
    codec = vae_bytes + (text_bytes + decoding if is_kept else max(text_bytes, decoding))
    ranks = tuple(replace(rank, codec=codec if rank.codec else 0) for rank in plan.ranks)
    return replace(plan, ranks=ranks, codec=codec)


def _num_texts(workload: Workload, request: Settings) -> int:
    """Most texts that are at hand at once."""
    if not request.shots:
        return 1
    return most_texts(text_plan(request, plan_of(request)).of_block, workload.schedule.num_in_flight())


def settle_text_encoder(request: Settings, model: ModelSizes, placement: Placement) -> Placement:
    """`placement` with `text_encoder` "auto" settled: keep where `request` fits beside it or the memory is not known, else
    away from its device, in host memory (GPUs) or dropped (CPU). Engines ask with the preset's own request."""
    if placement.text_encoder != "auto":
        return placement
    kept = replace(placement, text_encoder="keep")
    if plan_job(request, model, kept, is_short=True).refusal is None:
        return kept
    return replace(placement, text_encoder="cpu" if placement.on_gpu else "free")


def balanced_layers(request: Settings, model: ModelSizes, placement: Placement) -> tuple[int, ...]:
    """The layer split whose fullest rank needs least: layers move from the fullest rank to the emptiest while it helps."""
    return balanced(plan_job(request, model, placement, is_short=True), model).placement.layers


def balanced(plan: JobPlan, model: ModelSizes) -> JobPlan:
    """`plan` with the layers of `balanced_layers`."""
    while True:
        grid = plan.placement.grid
        by_stage = [[rank.total for rank in plan.memory.ranks[stage :: grid.stages]] for stage in range(grid.stages)]
        totals = [max(rings) for rings in by_stage]
        full, empty = totals.index(max(totals)), totals.index(min(totals))
        layers = list(plan.placement.layers)
        if full == empty or layers[full] == 1:
            return plan
        layers[full] -= 1
        layers[empty] += 1
        better = moved(plan, model, replace(plan.placement, layers=tuple(layers)))
        if better.bytes_per_rank >= plan.bytes_per_rank:
            return plan
        plan = better


def fastest_layers(request: Settings, model: ModelSizes, placement: Placement, speed: Speed | None = None) -> tuple[int, ...]:
    """The layer split whose slowest rank works least for `request`, by measured times or else by FLOPs.

    Where that does not fit the devices' memory it is the split that fills the fullest one least (`balanced_layers`).
    """
    plan = replace(plan_job(request, model, placement, is_short=True), speed=speed)
    total = sum((plan.step_times(item) for item in plan.workload.schedule.items), StepTimes(layer=0.0))
    if placement.guidance > 1:  # each ring works on one half; decoding is in the way of one rank
        total = replace(total, layer=total.layer / 2, first=total.first / 2, last=total.last / 2)
    layers = fastest_split(sum(placement.layers), len(placement.layers), total, placement.codec_stage)
    fits = moved(plan, model, replace(placement, layers=layers)).refusal is None
    return layers if fits else balanced_layers(request, model, placement)


def moved(plan: JobPlan, model: ModelSizes, placement: Placement) -> JobPlan:
    """`plan` on another placement: the same request and schedule, which is the costly part."""
    workload = replace(plan.workload, layers=placement.layers)
    memory = _memory(workload, plan.request, model, placement)
    return replace(plan, placement=placement, workload=workload, memory=memory)
