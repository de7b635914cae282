"""Denoising time against the number of latents (linear), against ranks, and against num_cat, as a table and an SVG.

A small random Wan, one thread a rank. More ranks than cores show what the engine adds, not what more devices would save.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import checkpoint, hardware, table, timed_job
from dualparal import Engine, GenerationRequest

COLORS = ("#5b8def", "#e0703c", "#3fa27a", "#8a63d2")
PANEL, LEFT, TOP, WIDTH, HEIGHT = 330, 52, 44, 250, 170


@dataclass(frozen=True)
class Line:
    """One line of a chart; `is_ideal` is drawn dashed: arithmetic, not measured."""

    name: str
    points: Sequence[tuple[float, float]]
    is_ideal: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    x_name: str
    lines: Sequence[Line]


def straightness(points: Sequence[tuple[float, float]]) -> float:
    """Largest deviation of a point from the least-squares line, as a share of the largest value."""
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return max(abs(y - mean_y - slope * (x - mean_x)) for x, y in points) / max(y for _, y in points)


def draw(charts: Sequence[Chart]) -> str:
    """The charts side by side, both axes from 0, as SVG text."""
    height = TOP + HEIGHT + 40 + 16 * max(len(chart.lines) for chart in charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{PANEL * len(charts)}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, chart in enumerate(charts):
        parts += _panel(chart, number * PANEL + LEFT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(chart: Chart, left: int) -> list[str]:
    points = [point for line in chart.lines for point in line.points]
    most_x, most_y = (max(values) or 1.0 for values in zip(*points, strict=True))
    bottom = TOP + HEIGHT

    def place(x: float, y: float) -> str:
        return f"{left + x / most_x * WIDTH:.1f},{bottom - y / most_y * HEIGHT:.1f}"

    parts = [
        f'<text x="{left - 40}" y="20" font-weight="bold">{chart.title}</text>',
        f'<path d="M{left},{TOP}V{bottom}H{left + WIDTH}" fill="none" stroke="#222"/>',
        f'<text x="{left - 6}" y="{TOP + 4}" text-anchor="end">{most_y:.3g} s</text>',
        f'<text x="{left - 6}" y="{bottom + 4}" text-anchor="end">0</text>',
        f'<text x="{left + WIDTH}" y="{bottom + 32}" text-anchor="end">{chart.x_name}</text>',
    ]
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{left + x / most_x * WIDTH:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for index, line in enumerate(chart.lines):
        color, y = COLORS[index % len(COLORS)], bottom + 48 + 16 * index
        dashes = ' stroke-dasharray="5 4"' if line.is_ideal else ""
        path = " ".join(place(*point) for point in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        if not line.is_ideal:
            parts += [
                f'<circle cx="{at.partition(",")[0]}" cy="{at.partition(",")[2]}" r="3" fill="{color}"/>' for at in path.split()
            ]
        parts.append(f'<path d="M{left},{y - 4}h24" stroke="{color}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{left + 30}" y="{y}">{line.name}</text>')
    return parts


@dataclass(frozen=True)
class Run:
    ranks: int
    latents_num: int
    num_cat: int
    context: str
    seconds: float


def measure(options: argparse.Namespace) -> list[Run]:
    """All runs of the three charts: every length on every number of ranks, every num_cat with either context on the last."""
    folder = checkpoint("mid", num_layers=8, num_heads=8, head_dim=32, ffn_dim=1024)
    base = GenerationRequest(
        prompt="scaling", num_per_block=options.num_per_block, num_inference_steps=options.steps, height=options.size_px,
        width=options.size_px, seed=0, guidance_scale=5.0, schedule="paper",
    )  # fmt: skip
    usual = options.num_per_block // 2
    by_cat = [(max(options.latents), cat, context) for context in ("recomputed", "cached") for cat in options.num_cat]
    runs = []
    for ranks in options.ranks:
        cases = [(latents_num, usual, "recomputed") for latents_num in options.latents]
        if ranks == options.ranks[-1]:
            cases += [case for case in by_cat if case not in cases]
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(folder, ranks=ranks, device="cpu", threads=1, outputs=outputs) as engine,
        ):
            timed_job(engine, base.model_copy(update={"latents_num": 4, "num_cat": 0, "num_inference_steps": 1}))
            for latents_num, num_cat, context in cases:
                changes = {"latents_num": latents_num, "num_cat": num_cat, "context": context}
                seconds = timed_job(engine, base.model_copy(update=changes))[1]
                runs.append(Run(ranks, latents_num, num_cat, context, seconds))
    return runs


def charts_of(runs: Sequence[Run], usual_cat: int) -> list[Chart]:
    """Time against latents, one line a number of ranks; against ranks, for the longest video; against num_cat."""
    longest = max(run.latents_num for run in runs)
    all_ranks = sorted({run.ranks for run in runs})
    usual = [run for run in runs if run.num_cat == usual_cat and run.context == "recomputed"]
    by_latents = [
        Line(f"{ranks} ranks", sorted((run.latents_num, run.seconds) for run in usual if run.ranks == ranks))
        for ranks in all_ranks
    ]
    by_ranks = sorted((run.ranks, run.seconds) for run in usual if run.latents_num == longest)
    whole = by_ranks[0][0] * by_ranks[0][1]
    last = [run for run in runs if run.latents_num == longest and run.ranks == all_ranks[-1]]
    by_cat = [
        Line(f"left context {context}", sorted((run.num_cat, run.seconds) for run in last if run.context == context))
        for context in ("recomputed", "cached")
    ]
    return [
        Chart("Time against latents", "latent frames", by_latents),
        Chart(
            f"Time against ranks, {longest} latents",
            "ranks",
            [Line("measured", by_ranks), Line("shared out evenly", [(n, whole / n) for n in all_ranks], is_ideal=True)],
        ),
        Chart(f"Time against num_cat, {all_ranks[-1]} ranks", "num_cat", by_cat),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="+", default=[12, 24, 36, 48])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-cat", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num-per-block", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("scaling.svg"))
    options = parser.parse_args()
    print(hardware(), f"{options.steps} steps, blocks of {options.num_per_block}, {options.size_px} pixels a side", sep="\n")
    runs = measure(options)
    rows = [[run.ranks, run.latents_num, run.num_cat, run.context, f"{run.seconds:.2f}"] for run in runs]
    print(table(["ranks", "latents", "num_cat", "left context", "denoise s"], rows))
    charts = charts_of(runs, options.num_per_block // 2)
    for line in charts[0].lines:
        print(f"{line.name}: at most {straightness(line.points):.1%} of the longest time off a straight line")
    if max(options.ranks) > (os.cpu_count() or 1):
        print(f"{max(options.ranks)} ranks share {os.cpu_count()} cores: what they add is the engine's own time")
    options.out.write_text(draw(charts))
    print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
