"""What the benches of joins share (`transitions.py`, `continuing.py`): pairs of prompts, films as frames, records that a run
which was stopped goes on from, and tables with intervals over the pairs.

A record is one film: its `kind`, its `prompt` (the pair's), `seed`, and the columns. Intervals are those of `bench quality`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import table
from dualparal import Engine, GenerationRequest
from dualparal.bench.report import difference, interval
from dualparal.pocket.metrics import Reading
from dualparal.pocket.world import Prompt, held_out_prompts

FPS = 16
THREE_SECONDS = 3 * FPS  # frames in which a motion can be told
Pair = tuple[Prompt, Prompt]
Record = dict[str, Any]


def prompt_pairs(num_pairs: int) -> list[Pair]:
    """Neighbours in shuffled lists of held-out prompts, that share no word but "a", "on" and "background"."""
    pairs: list[Pair] = []
    for seed in range(2, 100):
        shuffled = np.random.default_rng(seed).permutation(np.array(held_out_prompts(), dtype=object))
        pairs += [pair for pair in pairwise(shuffled) if not _words(pair[0]) & _words(pair[1]) and pair not in pairs]
        if len(pairs) >= num_pairs:
            break
    return pairs[:num_pairs]


def _words(prompt: Prompt) -> set[str]:
    return {prompt.color, prompt.shape, prompt.motion, prompt.background}


def name_of(pair: Pair) -> str:
    return f"{pair[0].caption} / {pair[1].caption}"


def frames_of(engine: Engine, request: GenerationRequest) -> tuple[str, np.ndarray]:
    """(the job, its frames [F, 64, 64, 3] uint8)."""
    job = engine.submit(request, export_images=True)
    job.result()
    pictures = sorted((job.folder.path / "frames").glob("*.png"))
    return job.id, np.stack([np.asarray(Image.open(path).convert("RGB")) for path in pictures])


def is_right(reading: Reading, prompt: Prompt) -> np.ndarray:
    """Per frame: colour, shape and background are the prompt's."""
    found = [np.array(reading.color) == prompt.color, np.array(reading.shape) == prompt.shape]
    return np.asarray(np.logical_and.reduce([*found, np.array(reading.background) == prompt.background]))


def change_at(frames: np.ndarray, border: int) -> float:
    """The change of the picture at the frame `border` over the film's median change from frame to frame."""
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    return float(change[border - 1] / np.median(change))


class Records:
    """Films that were measured, a JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.all: list[Record] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, kind: str, pair: Pair) -> bool:
        return any(one["kind"] == kind and one["prompt"] == name_of(pair) for one in self.all)

    def add(self, kind: str, pair: Pair, found: Record) -> None:
        record = {"kind": kind, "prompt": name_of(pair), "seed": 0, **found}
        self.all.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def tables(self, kinds: Sequence[str], columns: Sequence[tuple[str, str]], against: str) -> str:
        """Two tables: means with 95 % intervals, and what each kind has more than `against`, pair by pair; bold where the
        interval leaves 0 out. `columns` are (title, field)."""
        groups = {kind: [one for one in self.all if one["kind"] == kind] for kind in kinds}
        groups = {kind: group for kind, group in groups.items() if group}
        titles = [title for title, _ in columns]
        rows = [[kind, len(group), *(_cell(interval(group, field)) for _, field in columns)] for kind, group in groups.items()]
        text = table(["", "pairs", *titles], rows)
        if against not in groups:
            return text
        of_pairs = [
            [kind, _num_common(group, groups[against])]
            + [_cell(difference(group, groups[against], field), is_difference=True) for _, field in columns]
            for kind, group in groups.items()
            if kind != against
        ]
        return text + "\n\n" + table([f"less {against}", "pairs", *titles], of_pairs)


def _num_common(one: list[Record], other: list[Record]) -> int:
    return len({record["prompt"] for record in one} & {record["prompt"] for record in other})


def _cell(found: tuple[float, float, float] | None, *, is_difference: bool = False) -> str:
    if found is None:
        return "-"
    mean, low, high = found
    digits = 3 if max(abs(mean), abs(low), abs(high)) < 0.1 else 2
    if not is_difference:
        return f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return text if low <= 0 <= high else f"**{text}**"
