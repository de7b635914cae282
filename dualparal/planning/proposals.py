"""What to change so that a job fits its devices, what changes the video least first.

Tried together: where the parts are (text encoder away, the codec on a card of its own, another layer split: the same bits),
what takes less room (`_OPTIONS`), and smaller blocks. A set of changes is proposed only where no part of it is enough. Every
proposal is a whole plan that fits, so that its cost in time can be shown beside it. Pure arithmetic on `job_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from dualparal.method.rules import as_in_the_paper
from dualparal.planning.job_plan import JobPlan, balanced, moved, plan_job
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory_table import gigabytes
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.request import TEMPORAL_FACTOR, Settings

# num_per_block, num_cat: from the least to the greatest change.
BLOCKS = (
    (16, 8), (12, 8), (12, 4), (8, 8), (8, 4), (8, 2), (6, 4), (6, 2), (4, 4), (4, 2), (3, 2), (2, 2), (2, 1), (1, 1), (1, 0),
)  # fmt: skip
TINY_BLOCK = 4  # shorter blocks are warned of
MOST_GPUS = 8
MOST_PROPOSALS = 6


@dataclass(frozen=True)
class Proposal:
    """A change as the flags that make it, and the plan that then fits."""

    flags: str
    plan: JobPlan


_Place = tuple[str, JobPlan]  # flags, short plan


def propose(request: Settings, model: ModelSizes, placement: Placement, speed: Speed | None = None) -> list[Proposal]:
    """Ways to make `request` fit `placement`, those that change the video least first; empty when nothing here helps.

    The last one may be more GPUs of the same size, for the video as it is. Nothing is proposed for a plan that fits already,
    or whose devices' memory is not known.
    """
    if placement.bytes_per_device is None or plan_job(request, model, placement, is_short=True).refusal is None:
        return []
    found = list(islice(_on_these_devices(request, model, placement), MOST_PROPOSALS))
    found += islice(_on_more_gpus(request, model, placement), 1)
    return [Proposal(flags, plan_job(plan.request, model, plan.placement, speed=speed)) for flags, plan in found]


def first_proposal(request: Settings, model: ModelSizes, placement: Placement) -> Proposal | None:
    """The proposal for these devices that changes the video least, without times; None when there is none."""
    if placement.bytes_per_device is None:
        return None
    return next((Proposal(*found) for found in _on_these_devices(request, model, placement)), None)


@dataclass(frozen=True)
class _Option:
    flags: str
    is_open: Callable[[Settings, Placement], bool]
    apply: Callable[[Settings, Placement], tuple[Settings, Placement]]


# From the least change of the video to the greatest. One ring, offloaded caches and layers give the same bits.
_OPTIONS = (
    _Option(
        "--guidance_parallel 1",
        lambda request, placement: placement.guidance > 1 and placement.grid.ranks <= sum(placement.layers),
        lambda request, placement: (request, _on_one_ring(placement)),
    ),
    _Option(
        "--offload_cache",
        lambda request, placement: placement.on_gpu and not placement.is_cache_offloaded and request.context == "cached",
        lambda request, placement: (request, replace(placement, is_cache_offloaded=True)),
    ),
    _Option(
        "--offload",
        lambda request, placement: placement.on_gpu and not placement.is_offloaded and placement.quantization != "int8",
        lambda request, placement: (request, replace(placement, is_offloaded=True)),
    ),
    _Option(
        "--schedule paper --context recomputed",
        lambda request, placement: request.context == "cached",
        lambda request, placement: (as_in_the_paper(request, placement.guidance), placement),
    ),
    _Option(
        "--vae_dtype bfloat16",
        lambda request, placement: placement.on_gpu and placement.vae_dtype == "float32",
        lambda request, placement: (request, replace(placement, vae_dtype="bfloat16")),
    ),
    _Option(
        "--quantization fp8",
        lambda request, placement: placement.quantization is None,
        lambda request, placement: (request, replace(placement, quantization="fp8")),
    ),
)


def _on_one_ring(placement: Placement) -> Placement:
    return replace(placement, guidance=1, layers=even_layers(sum(placement.layers), placement.grid.ranks))


def _on_these_devices(request: Settings, model: ModelSizes, placement: Placement) -> Iterator[_Place]:
    """The largest blocks that fit, for every set of options of which no part does as well."""
    options = [option for option in _OPTIONS if option.is_open(request, placement)]
    all_options = 2 ** len(options) - 1
    enough: list[int] = []  # sets of options, as bits, with which blocks as large or larger fit
    for blocks, asked in _block_sizes(request):
        known: dict[str | None, JobPlan] = {}
        if _fitting(options, all_options, blocks, asked, model, placement, known) is None:
            continue
        for chosen in range(all_options + 1):
            if any(chosen & part == part for part in enough):
                continue
            found = _fitting(options, chosen, blocks, asked, model, placement, known)
            if found is not None:
                enough.append(chosen)
                yield found
        if 0 in enough:
            return


def _fitting(
    options: Sequence[_Option],
    chosen: int,
    flags: str,
    request: Settings,
    model: ModelSizes,
    placement: Placement,
    known: dict[str | None, JobPlan],
) -> _Place | None:
    """`request` with the options of `chosen`, placed so that it fits; `known` keeps schedules, the costly part, by context."""
    where = placement
    for bit, option in enumerate(options):
        if chosen >> bit & 1:
            flags = _joined(option.flags, flags)
            request, where = option.apply(request, where)
    if request.context not in known:
        known[request.context] = plan_job(request, model, where, is_short=True)
    found = next(_places(moved(known[request.context], model, where), model), None)
    if found is None:
        return None
    moves, plan = found
    is_named = "--text_encoder" in moves or plan.placement.text_encoder == "keep"
    if not is_named and replace(plan.placement, text_encoder=placement.text_encoder) != placement:
        moves = _joined(moves, f"--text_encoder {plan.placement.text_encoder}")  # `auto` might settle it otherwise elsewhere
    return _joined(moves, flags), plan


def _block_sizes(request: Settings) -> Iterator[tuple[str, Settings]]:
    """The request as it is, then with shorter windows."""
    yield "", request
    for num_per_block, num_cat in BLOCKS:
        is_smaller = (num_per_block, num_cat) != (request.num_per_block, request.num_cat)
        if is_smaller and num_per_block <= request.num_per_block and num_cat <= request.num_cat:
            asked = request.model_copy(update={"num_per_block": num_per_block, "num_cat": num_cat})
            yield f"--num_per_block {num_per_block} --num_cat {num_cat}", asked


def _places(plan: JobPlan, model: ModelSizes) -> Iterator[_Place]:
    """Places for the parts with which `plan` fits, the fastest and simplest first. No bit of the video depends on them."""
    placement = plan.placement
    here = [("", plan), *_without_text(plan, model)]
    yield from _that_fit(here)
    if not placement.on_gpu or len(placement.layers) == 1:
        return
    elsewhere: list[_Place] = []
    if placement.codec_rank is not None:
        layers = even_layers(sum(placement.layers), len(placement.layers) - 1)
        flags = f"--ranks {len(layers) * placement.guidance}"
        if even_layers(sum(placement.layers), len(placement.layers)) != placement.layers:
            flags += _split_flag(layers)  # in place of a split for more ranks
        alone = moved(plan, model, replace(placement, layers=layers, codec_rank=None))
        elsewhere += [(flags, alone), *((_joined(flags, text), it) for text, it in _without_text(alone, model))]
    for text, it in here:
        have = placement.bytes_per_device or 0
        if sum(rank.total for rank in it.memory.ranks) <= have * len(it.memory.ranks):  # else no split can do it
            even = balanced(it, model)
            elsewhere.append((_joined(_split_flag(even.placement.layers).strip(), text), even))
    yield from _that_fit(sorted(elsewhere, key=lambda it: max(it[1].placement.layers)))


def _that_fit(places: Sequence[_Place]) -> Iterator[_Place]:
    return (place for place in places if place[1].refusal is None)


def _without_text(plan: JobPlan, model: ModelSizes) -> list[_Place]:
    if plan.placement.text_encoder != "keep":
        return []
    where = "cpu" if plan.placement.on_gpu else "free"
    return [(f"--text_encoder {where}", moved(plan, model, replace(plan.placement, text_encoder=where)))]


def _split_flag(layers: Sequence[int]) -> str:
    return f" --layer_split {','.join(map(str, layers))}"


def even_layers(num_layers: int, ranks: int) -> tuple[int, ...]:
    """`num_layers` split as evenly as can be."""
    return tuple(len(stage) for stage in split_layers(num_layers, ranks))


def _on_more_gpus(request: Settings, model: ModelSizes, placement: Placement) -> Iterator[_Place]:
    """More GPUs of the same size that hold the request as it is. On a CPU more ranks need more memory, not less."""
    if not placement.on_gpu:
        return
    num_layers, gpus = sum(placement.layers), placement.grid.ranks + (placement.codec_rank is None)
    is_split_by_hand = placement.layers != even_layers(num_layers, len(placement.layers))
    for more in range(gpus + 1, min(MOST_GPUS, num_layers * placement.guidance) + 1):
        if more % placement.guidance:
            continue
        where = replace(placement, layers=even_layers(num_layers, more // placement.guidance), codec_rank=more - 1)
        for flags, plan in _places(plan_job(request, model, where, is_short=True), model):
            if is_split_by_hand and "--layer_split" not in flags:
                flags += _split_flag(plan.placement.layers)
            yield _joined(f"--gpus {more}", flags), plan


def changes_in_words(asked: JobPlan, proposed: JobPlan) -> list[str]:
    """What is different in `proposed`, one line each with what it costs."""
    before, after, old, new = asked.placement, proposed.placement, asked.request, proposed.request
    lines = []
    if after.guidance != before.guidance:
        lines.append("the guidance halves on the same ranks: the same bits, first frames later")
    if after.layers != before.layers or after.codec_rank != before.codec_rank:
        codec = f"rank {after.codec_rank}'s GPU" if after.codec_rank is not None else "a GPU of its own"
        lines.append(f"{', '.join(map(str, after.layers))} layers, the codec on {codec}: the same bits")
    if after.text_encoder != before.text_encoder:
        lines.append("the text encoder leaves the GPU after encoding: the same bits, some seconds more for every new prompt")
    if after.is_offloaded and not before.is_offloaded:
        lines.append(
            f"layers wait in {gigabytes(proposed.memory.host_layers)} of host memory: the same bits, slower where windows are "
            "short"
        )
    if after.is_cache_offloaded and not before.is_cache_offloaded:
        lines.append(
            f"left caches wait in {gigabytes(proposed.memory.host_caches)} of host memory: the same bits, slower where copies "
            "take longer than the work beside them"
        )
    if new.context != old.context:
        lines.append("left context recomputed, in the paper's order: other numbers, more work, first frames late")
    if after.vae_dtype != before.vae_dtype:
        lines.append(
            f"VAE in {after.vae_dtype}: 0.03 dB worse in a small VAE, Wan's own has not been measured (docs/benchmarks.md)"
        )
    if after.quantization != before.quantization:
        lines.append(
            f"weights in {after.quantization}: a small model was off by 4.0 % where bfloat16 alone is by 3.7 % "
            "(docs/benchmarks.md), Wan's own has not been measured"
        )
    if (new.num_per_block, new.num_cat) != (old.num_per_block, old.num_cat):
        costs = ", ".join(
            ["more seams"] * (new.num_per_block < old.num_per_block)
            + ["less holds them together"] * (new.num_cat < old.num_cat)
        )
        lines.append(
            f"blocks of {new.num_per_block} latents with {new.num_cat} of context instead of {old.num_per_block} with "
            f"{old.num_cat}: {costs}"
        )
        if new.num_per_block < TINY_BLOCK:
            every = new.num_per_block * TEMPORAL_FACTOR / new.fps
            lines.append(
                f"these blocks are tiny: a seam every {every:.2g} s, and short windows keep a GPU badly busy; last resort"
            )
    return lines


def _joined(*flags: str) -> str:
    return " ".join(flag for flag in flags if flag)
