"""What a memory plan says: bytes by rank and by kind, as a table and in a sentence. `planning.memory` counts them."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank holds at its worst moment, by kind."""

    weights: int
    loras: int = 0  # of the video, which run beside the weights
    feature_cache: int  # K and V for neighbouring blocks
    activations: int  # the worst moment inside a layer
    messages: int  # activations received, awaited and being sent
    text: int  # text and its K and V, time projections, position table
    latents: int  # of the blocks in flight, with their samplers (rank 0)
    codec: int  # text encoder, VAE and decoding, where the codec shares this rank's device
    runtime: int  # CUDA's own

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class MemoryPlan:
    """`ranks[r]` for each rank; `layers[r]` its layers; `codec` is the codec's need wherever it runs; `host_layers` and
    `host_caches` are the bytes of all ranks' offloaded layers and left caches in host memory."""

    ranks: tuple[RankMemory, ...]
    layers: tuple[int, ...]
    codec: int
    host_layers: int = 0
    host_caches: int = 0

    @property
    def most(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.total for rank in self.ranks)

    def refusal(self, bytes_per_device: int) -> str | None:
        """One sentence when a rank does not fit into `bytes_per_device`, else None."""
        worst = max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total)
        need = self.ranks[worst].total
        if need <= bytes_per_device:
            return None
        return (
            f"rank {worst} needs {gigabytes(need)} and has {gigabytes(bytes_per_device)}; use more ranks, a smaller picture, "
            "or a smaller num_per_block or num_cat"
        )


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table: one row per rank, gigabytes (10^9 bytes) by kind."""
    kinds = [item.name for item in fields(RankMemory) if any(getattr(rank, item.name) for rank in plan.ranks)]
    rows = [["rank", "layers", *(kind.replace("_", " ") for kind in kinds), "total"]]
    for number, rank in enumerate(plan.ranks):
        cells = [f"{getattr(rank, kind) / 1e9:.2f}" for kind in kinds]
        rows.append([str(number), str(plan.layers[number]), *cells, f"{rank.total / 1e9:.2f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    where = "on a rank's device (included above)" if any(rank.codec for rank in plan.ranks) else "on a device of its own"
    total = sum(rank.total for rank in plan.ranks)
    waiting = [(plan.host_layers, "layers"), (plan.host_caches, "left caches")]
    host = "".join(f" Offloaded {what}: {gigabytes(size)} of host memory." for size, what in waiting if size)
    return "\n".join(
        [*lines, f"All ranks: {gigabytes(total)}. Codec: {gigabytes(plan.codec)}, {where}.{host} GB = 10^9 bytes."]
    )


def gigabytes(num_bytes: int) -> str:
    """Bytes for people: 20.4 GB."""
    return f"{num_bytes / 1e9:.1f} GB"
