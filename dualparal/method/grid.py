"""Where a rank stands: ranks = stages x guidance (METHOD.md, "Within a stage"). Pure: knows no process.

A *ring* is a row of stages that block steps travel through. With `guidance` 2 there are two: the conditional halves and the
steps without guidance take ring 0, the unconditional halves ring 1, and rank 0, which begins ring 0, combines them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualparal.errors import RequestError

Ring = int | None  # None: the only one, which takes both guidance halves


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Messages of the `ring`-th ring go from rank `source` to rank `target`: activations, or with `is_latents` what rank 0
    sends to the beginning of the ring and gets from its end."""

    source: int
    target: int
    ring: int
    is_latents: bool


@dataclass(frozen=True)
class Grid:
    """`stages` of a ring, `guidance` rings. Ranks are numbered ring by ring."""

    stages: int = 1
    guidance: int = 1

    @classmethod
    def of(cls, ranks: int, guidance: int = 1) -> Grid:
        """`ranks` in all. Raises `RequestError` where they do not make whole stages."""
        if ranks % guidance:
            raise RequestError(
                f"ranks={ranks} does not go with guidance_parallel={guidance}, which needs two ranks for each stage; use "
                f"ranks={ranks + 1}, or guidance_parallel=1",
                "guidance_parallel",
            )
        return cls(ranks // guidance, guidance)

    @property
    def ranks(self) -> int:
        return self.stages * self.guidance

    @property
    def rings(self) -> tuple[Ring, ...]:
        return (None,) if self.guidance == 1 else (0, 1)

    def ring_of(self, rank: int) -> Ring:
        return self.rings[rank // self.stages]

    def stage_of(self, rank: int) -> int:
        return rank % self.stages

    @property
    def names(self) -> tuple[str, ...]:
        """What ranks are called on the page and in a job's timeline."""
        return tuple(f"stage {self.stage_of(rank)}{' beside' * (rank >= self.stages)}" for rank in range(self.ranks))

    def edges(self) -> Iterator[Edge]:
        """All connections, in the order in which every rank makes them."""
        for ring in range(self.guidance):
            first = ring * self.stages
            last = first + self.stages - 1
            if ring:
                yield Edge(source=0, target=first, ring=ring, is_latents=True)
            for rank in range(first, last):
                yield Edge(source=rank, target=rank + 1, ring=ring, is_latents=False)
            if last:
                yield Edge(source=last, target=0, ring=ring, is_latents=True)
