"""From the records of `quality.py` to tables with 95 % intervals (bootstrap over videos) and a plot. Pure numpy and text.

Methods share prompts and seeds, so the difference of two is surer than either: prompts differ more than methods do.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Interval = tuple[float, float, float]
COLUMNS = (
    ("frames", "num_frames"),
    ("colour", "color"),
    ("shape", "shape"),
    ("background", "background"),
    ("motion", "motion"),
    ("all", "all"),
    ("all, last quarter", "all_last_quarter"),
    ("palette error, first quarter", "palette_first"),
    ("palette error, last quarter", "palette_last"),
    ("repetition", "repetition"),
    ("seam: position", "jump_position"),
    ("seam: velocity", "jump_velocity"),
    ("seam: size", "jump_size"),
    ("seam: colour", "jump_color"),
    ("s per video", "seconds"),
)
COMPARED = ("motion", "all", "palette error, last quarter", "seam: position", "seam: velocity", "seam: size", "seam: colour")
AGAINST = "paper 8+4, recomputed"
PLOTTED = ("all", "palette error, last quarter", "seam: position")


def interval(records: list[dict[str, Any]], field: str, *, num_draws: int = 2000) -> Interval | None:
    """Mean (for jumps: the ratio of the mean at block borders to the mean inside blocks) and its 95 % bootstrap interval."""
    table = _values(records, field)
    if not len(table):
        return None
    drawn = np.random.default_rng(0).integers(len(table), size=(num_draws, len(table)))
    return _interval(_means(table[None], field)[0], _means(table[drawn], field))


def difference(
    records: list[dict[str, Any]], others: list[dict[str, Any]], field: str, *, num_draws: int = 2000
) -> Interval | None:
    """What `records` have more of than `others`, over the prompts and seeds that both have; the same videos are drawn of both.
    None where there are none."""
    theirs = {(r["prompt"], r["seed"]): r for r in others if _is_there(r[field])}
    pairs = [(r, theirs[key]) for r in records if _is_there(r[field]) and (key := (r["prompt"], r["seed"])) in theirs]
    if not pairs:
        return None
    drawn = np.random.default_rng(0).integers(len(pairs), size=(num_draws, len(pairs)))
    ours, other = (_values([pair[side] for pair in pairs], field) for side in (0, 1))
    draws = _means(ours[drawn], field) - _means(other[drawn], field)
    return _interval((_means(ours[None], field) - _means(other[None], field))[0], draws)


def _is_there(value: Any) -> bool:
    return value is not None and (not isinstance(value, list) or None not in value)


def _values(records: list[dict[str, Any]], field: str) -> np.ndarray:
    """[videos], or for jumps [videos, 2]: at block borders, and inside blocks."""
    return np.asarray([r[field] for r in records if _is_there(r[field])], np.float64)


def _means(drawn: np.ndarray, field: str) -> np.ndarray:
    """Of [draws, videos(, 2)]: the mean of each draw, for jumps the ratio of the two means."""
    mean: np.ndarray = drawn.mean(axis=1)
    return mean[:, 0] / (mean[:, 1] + 1e-9) if field.startswith("jump_") else mean


def _interval(mean: float, draws: np.ndarray) -> Interval:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(mean), float(low), float(high)


def by_method(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["method"]["name"]].append(record)
    return dict(groups)


def place_spread(records: list[dict[str, Any]]) -> float | None:
    """Diversity: mean distance on the torus between the objects' first places, over pairs of videos of one prompt."""
    by_prompt: dict[str, list[list[float]]] = defaultdict(list)
    for record in records:
        by_prompt[record["prompt"]].append(record["start_px"])
    distances = []
    for places in by_prompt.values():
        table = np.asarray(places)
        for i in range(len(table)):
            offset = (table[i + 1 :] - table[i] + 32) % 64 - 32
            distances += list(np.linalg.norm(offset, axis=1))
    return float(np.nanmean(distances)) if distances else None


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per method."""
    groups = by_method(records)
    lines = ["| method | videos | " + " | ".join(title for title, _ in COLUMNS) + " | spread of places (px) |"]
    lines.append("| --- |" + " --- |" * (len(COLUMNS) + 2))
    for name, group in groups.items():
        cells = [name, str(len(group))]
        for _, field in COLUMNS:
            found = interval(group, field)
            if found is None:
                cells.append("-")
            elif field in ("num_frames", "seconds"):
                cells.append(f"{found[0]:.0f}" if field == "num_frames" else f"{found[0]:.1f}")
            else:
                cells.append(f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})" if "palette" not in field
                             else f"{found[0]:.3f} ({found[1]:.3f}-{found[2]:.3f})")  # fmt: skip
        spread = place_spread(group)
        lines.append("| " + " | ".join([*cells, "-" if spread is None else f"{spread:.1f}"]) + " |")
    return "\n".join(lines)


def table_of_differences(records: list[dict[str, Any]], against: str) -> str:
    """A Markdown table: every method less `against`, paired; bold where the interval leaves 0 out. Empty without `against`."""
    groups, fields = by_method(records), dict(COLUMNS)
    if against not in groups:
        return ""
    lines = [f"| less {against} | pairs | {' | '.join(COMPARED)} |", "| --- |" + " --- |" * (len(COMPARED) + 1)]
    for name, group in groups.items():
        if name == against:
            continue
        both = {(r["prompt"], r["seed"]) for r in group} & {(r["prompt"], r["seed"]) for r in groups[against]}
        cells = [name, str(len(both))]
        for title in COMPARED:
            found = difference(group, groups[against], fields[title])
            digits = 3 if "palette" in title else 2
            text = "-" if found is None else f"{found[0]:+.{digits}f} ({found[1]:+.{digits}f} to {found[2]:+.{digits}f})"
            cells.append(f"**{text}**" if found is not None and not found[1] <= 0 <= found[2] else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]]) -> str:
    """Three panels of bars with intervals, as SVG text."""
    groups = by_method(records)
    fields = dict(COLUMNS)
    row, width, label = 22, 250, 190
    height = 40 + row * len(groups)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{label + width * len(PLOTTED)}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for column, title in enumerate(PLOTTED):
        left, span = label + column * width, width - 40
        found = {name: interval(group, fields[title]) for name, group in groups.items()}
        top = max([i[2] for i in found.values() if i is not None] or [1.0]) or 1.0
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{title} (0 to {top:.2g})</text>')
        for index, (name, value) in enumerate(found.items()):
            y = 32 + index * row
            if column == 0:
                parts.append(f'<text x="6" y="{y + 12}">{name}</text>')
            if value is None:
                parts.append(f'<text x="{left}" y="{y + 12}" fill="#888">none</text>')
                continue
            mean, low, high = (v / top * span for v in value)
            parts.append(f'<rect x="{left}" y="{y}" width="{mean:.1f}" height="14" fill="#5b8def"/>')
            parts.append(f'<path d="M{left + low:.1f} {y + 7}H{left + high:.1f}" stroke="#222" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_report(records: list[dict[str, Any]], out: Path, against: str = AGAINST) -> str:
    """Write `quality.md` and `quality.svg` into `out`; returns the tables, differences less the method `against`."""
    text = "\n\n".join(filter(None, [table(records), table_of_differences(records, against)]))
    (out / "quality.svg").write_text(plot(records))
    (out / "quality.md").write_text(text + "\n")
    return text
