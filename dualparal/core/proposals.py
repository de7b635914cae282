"""What to change so that a job fits its devices: text encoder away, another layer split, layers in host memory, 8-bit weights,
smaller blocks, more GPUs.

Every proposal is a whole plan that fits, so that its cost in time can be shown beside it. Pure arithmetic on `job_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dualparal.core.job_plan import JobPlan, ModelSizes, Placement, Speed, balanced_layers, plan_job
from dualparal.request import GenerationRequest

BLOCKS = ((8, 4), (8, 2), (6, 4), (6, 2), (4, 4), (4, 2), (3, 2), (2, 2), (2, 1), (1, 1), (1, 0))  # num_per_block, num_cat
MOST_RANKS = 8


@dataclass(frozen=True)
class Proposal:
    """A change in words, the flags that make it, and the plan that then fits."""

    flags: str
    plan: JobPlan


def propose(request: GenerationRequest, model: ModelSizes, placement: Placement, speed: Speed | None = None) -> list[Proposal]:
    """Ways to make `request` fit `placement`, those that change the video least first; empty when nothing here helps.

    Nothing is proposed for a plan that fits already, or whose devices' memory is not known.
    """
    if placement.bytes_per_device is None or plan_job(request, model, placement, is_short=True).refusal is None:
        return []
    found = _first_fitting(_same_video(request, model, placement), model, 2)
    smaller = _first_fitting(_smaller_blocks(request, model, placement), model, 2)
    for option in (_offloaded(request, model, placement), _quantized(request, model, placement)):
        # Worth it only where it leaves larger blocks.
        found += [it for it in _first_fitting(option, model, 1) if not smaller or _blocks(it) != _blocks(smaller[0])]
    found += smaller
    found += _first_fitting(_more_ranks(request, model, placement), model, 1)
    return [Proposal(flags, plan_job(asked, model, where, speed=speed)) for flags, asked, where in found]


_Candidate = tuple[str, GenerationRequest, Placement]


def _blocks(candidate: _Candidate) -> tuple[int | None, int | None]:
    return candidate[1].num_per_block, candidate[1].num_cat


def _first_fitting(candidates: Iterator[_Candidate], model: ModelSizes, most: int) -> list[_Candidate]:
    found: list[_Candidate] = []
    seen = set()  # an uneven layer split is only worth it where the even one does not fit
    for candidate in candidates:
        _, request, placement = candidate
        kind = (request.num_per_block, request.num_cat, request.context, placement.text_encoder, len(placement.layers))
        if kind in seen:
            continue
        if plan_job(request, model, placement, is_short=True).refusal is None:
            found.append(candidate)
            seen.add(kind)
            if len(found) == most:
                break
    return found


def _same_video(request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    """Changes that leave every bit of the video as it is, or (context) nearly so."""
    for flags, asked in _without_left_cache(request):
        for text, where in _without_text(placement):
            if text or flags:
                yield _joined(text, flags), asked, where
            yield from _split(_joined(text, flags), asked, model, where)


def _without_left_cache(request: GenerationRequest) -> Iterator[tuple[str, GenerationRequest]]:
    yield "", request
    if request.context == "cached":
        yield "--context recomputed", request.model_copy(update={"context": "recomputed"})


def _without_text(placement: Placement) -> Iterator[tuple[str, Placement]]:
    yield "", placement
    if placement.text_encoder == "keep" and placement.on_gpu:
        yield "--text_encoder cpu", replace(placement, text_encoder="cpu")
    elif placement.text_encoder == "keep":
        yield "--text_encoder free", replace(placement, text_encoder="free")


def _split(flags: str, request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    layers = balanced_layers(request, model, placement)
    if layers != placement.layers:
        split = f"--layer_split {','.join(map(str, layers))}"
        yield _joined(flags, split), request, replace(placement, layers=layers)


def _offloaded(request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    """Layers that wait in host memory: the same bits, slower where windows are short."""
    if placement.on_gpu and not placement.is_offloaded and placement.quantization != "int8":
        yield from _as_is_or_smaller("--offload", request, model, replace(placement, is_offloaded=True))


def _quantized(request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    """Weights in 8 bits: nearly the same video."""
    if placement.quantization is None:
        yield from _as_is_or_smaller("--quantization fp8", request, model, replace(placement, quantization="fp8"))


def _as_is_or_smaller(option: str, request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    for text, where in _without_text(placement):
        yield _joined(text, option), request, where
    for flags, asked, where in _smaller_blocks(request, model, placement):
        yield _joined(option, flags), asked, where


def _smaller_blocks(request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    """Shorter windows; with the text encoder away and layers balanced, so that blocks stay as long as they can."""
    assert request.num_per_block and request.num_cat is not None
    *_, (text, where) = _without_text(placement)
    for num_per_block, num_cat in BLOCKS:
        is_smaller = (num_per_block, num_cat) != (request.num_per_block, request.num_cat)
        if is_smaller and num_per_block <= request.num_per_block and num_cat <= request.num_cat:
            asked = request.model_copy(update={"num_per_block": num_per_block, "num_cat": num_cat})
            flags = _joined(text, f"--num_per_block {num_per_block} --num_cat {num_cat}")
            yield flags, asked, where
            yield from _split(flags, asked, model, where)


def _more_ranks(request: GenerationRequest, model: ModelSizes, placement: Placement) -> Iterator[_Candidate]:
    """The fewest GPUs of the same size that hold the request as it is. On a CPU more ranks need more memory, not less."""
    if not placement.on_gpu:
        return
    num_layers = sum(placement.layers)
    for ranks in range(len(placement.layers) + 1, MOST_RANKS + 1):
        layers = tuple(num_layers // ranks + (rank < num_layers % ranks) for rank in range(ranks))
        codec_rank = None if placement.codec_rank is None else ranks - 1
        for text, where in _without_text(replace(placement, layers=layers, codec_rank=codec_rank)):
            flags = _joined(f"--gpus {ranks + (codec_rank is None)}", text)
            yield flags, request, where
            yield from _split(flags, request, model, where)


def _joined(*flags: str) -> str:
    return " ".join(flag for flag in flags if flag)
