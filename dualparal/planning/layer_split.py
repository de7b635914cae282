"""Layers per rank so that the slowest stage is as fast as it can be (`--layer_split auto`).

A pipeline runs at the pace of its slowest stage. The layers of a Wan DiT cost the same, what comes besides does not: rank 0
embeds patches and steps the samplers, the last rank has the output head, and one rank's device may decode as well. Pure
arithmetic; `job_plan.fastest_layers` says what the times are. The bits of a video do not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualparal.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What a block step, or many of them, take, in any one unit.

    `layer`: one layer. `first`: what rank 0 does besides its layers (patch embedding, sampler). `last`: what the last rank
    does (output head). `decode`: decoding, on the device that the codec shares with a rank.
    """

    layer: float
    first: float = 0.0
    last: float = 0.0
    decode: float = 0.0

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(
            layer=self.layer + other.layer, first=self.first + other.first, last=self.last + other.last,
            decode=self.decode + other.decode,
        )  # fmt: skip

    def besides(self, ranks: int, codec_rank: int | None, rings: int = 1) -> list[float]:
        """What each rank of `rings` rings of `ranks` does besides its layers; `codec_rank` None: the codec is in nobody's
        way."""
        found = [0.0] * ranks * rings
        for ring in range(rings):
            found[ring * ranks] += self.first
            found[(ring + 1) * ranks - 1] += self.last
        if codec_rank is not None:
            found[codec_rank] += self.decode
        return found

    def of_ranks(self, layers: Sequence[int], codec_rank: int | None, rings: int = 1) -> list[float]:
        """What each rank takes when stage s has `layers[s]` layers."""
        besides = self.besides(len(layers), codec_rank, rings)
        return [other + layers[rank % len(layers)] * self.layer for rank, other in enumerate(besides)]


def fastest_split(num_layers: int, ranks: int, times: StepTimes, codec_rank: int | None = None) -> tuple[int, ...]:
    """Layers per rank, at least 1 each, whose slowest rank is fastest; of equally good splits the most even one.

    Each layer in turn goes to the rank that is done soonest with it, the earlier one of two: as all layers cost the same, no
    other split has a faster slowest rank. With nothing besides the layers this is the even split.
    """
    if not 1 <= ranks <= num_layers:
        raise ValueError(f"{num_layers} layers do not split over {ranks} ranks")
    besides = times.besides(ranks, codec_rank)
    layers = [1] * ranks
    for _ in range(num_layers - ranks):
        # Rounded: what differs by the order of additions only is the same time.
        done = [round(other / times.layer + count + 1, 9) for other, count in zip(besides, layers, strict=True)]
        layers[done.index(min(done))] += 1
    return tuple(layers)


def split_layers(num_layers: int, ranks: int, layer_split: Sequence[int] | None = None) -> tuple[range, ...]:
    """The contiguous layers of each rank: as `layer_split` counts them, else as even as can be (earlier ranks take the rest).

    Raises `RequestError` when a rank would be left without a layer or the counts do not add up.
    """
    if layer_split is not None:
        if len(layer_split) != ranks or sum(layer_split) != num_layers or min(layer_split) < 1:
            raise RequestError(
                f"layer_split={','.join(map(str, layer_split))} does not fit: it needs {ranks} counts of at least 1 that add "
                f"up to the model's {num_layers} layers",
                "layer_split",
            )
        counts = list(layer_split)
    else:
        if not 1 <= ranks <= num_layers:
            raise RequestError(f"ranks={ranks} does not fit: the model has {num_layers} layers; use 1 to {num_layers}", "ranks")
        counts = [num_layers // ranks + (rank < num_layers % ranks) for rank in range(ranks)]
    starts = [sum(counts[:rank]) for rank in range(ranks)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
