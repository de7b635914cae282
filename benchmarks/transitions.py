"""How a new prompt takes over: films of two shots by Pocket Wan for every transition, schedule and context, for one prompt
throughout, and two separate videos joined by a hard cut.

    python -m benchmarks.transitions [--pairs 24] [--out transitions] [--report_only]

Pairs of held-out prompts that share no word but "a", "on" and "background"; shots of 16 and 24 latents (32 after a blend, which
takes 24), blocks of 8 + 8, the preset's steps. A run that was stopped goes on where it was. Columns, means over the pairs with
95 % intervals:

* old, last second: share of the frames before the border with colour, shape and background of the first prompt; old motion: in
  its last three seconds.
* new after, s: seconds from the border until half a second of frames in a row has all three of the second prompt's; a film
  that never has them counts all its seconds. new, last 3 s: share of such frames; new motion: in those three seconds.
* change: of the picture at the border, over the film's median change from frame to frame. step: the object's longest way
  from one frame to the next in the half second around the border, in pixels of 64.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import hardware
from benchmarks.pairs import FPS, THREE_SECONDS, Pair, Record, Records, change_at, frames_of, is_right, prompt_pairs
from dualparal import Engine, GenerationRequest
from dualparal.pocket.metrics import adherence, read_frames, velocities

LATENTS = 16, 24  # of the shots
AFTER_A_BLEND = 32  # so that its last block is seen to its end
SAME, APART = "same prompt", "two videos"
DEFAULT = "preview, cached"
METHODS = {  # in the order that they are made in
    "preview, cached": ("switch", "blend", "cut", SAME, APART),
    "paper, recomputed": ("switch", "blend", SAME),
    "paper, cached": ("switch", "blend", SAME),
}
COLUMNS = (
    ("old, last second", "old"), ("old motion", "old_motion"), ("new after, s", "new_after_s"), ("new, last 3 s", "new"),
    ("new motion", "new_motion"), ("change", "change"), ("step, px", "step_px"),
)  # fmt: skip


def make(engine: Engine, method: str, transition: str, pair: Pair) -> np.ndarray:
    """Frames [F, 64, 64, 3] uint8."""
    schedule, context = method.split(", ")
    rules = {"num_per_block": 8, "num_cat": 8, "schedule": schedule, "context": context}
    if transition == APART:
        parts = zip(pair, LATENTS, (1, 2), strict=True)
        films = [GenerationRequest(prompt=one.caption, latents_num=n, seed=seed, **rules) for one, n, seed in parts]
        return np.concatenate([frames_of(engine, film)[1] for film in films])
    second = pair[0] if transition == SAME else pair[1]
    shots = [
        {"prompt": pair[0].caption, "latents_num": LATENTS[0]},
        {
            "prompt": second.caption,
            "latents_num": AFTER_A_BLEND if transition == "blend" else LATENTS[1],
            "transition": "switch" if transition == SAME else transition,
        },
    ]
    return frames_of(engine, GenerationRequest(shots=shots, seed=1, **rules))[1]


def measure(frames: np.ndarray, pair: Pair, transition: str) -> Record:
    """The columns of one film."""
    border = 4 * LATENTS[0] - 3
    new = pair[0] if transition == SAME else pair[1]
    reading = read_frames(frames)
    before, after, late = (
        reading.part(0, border),
        reading.part(border, len(frames)),
        reading.part(-THREE_SECONDS, len(frames)),
    )
    steps = np.linalg.norm(velocities(reading.center_px), axis=1)[border - 5 : border + 4]
    return {
        "old": float(is_right(before, pair[0])[-FPS:].mean()),
        "old_motion": adherence(before.part(border - THREE_SECONDS, border), pair[0])["motion"],
        "new_after_s": all_there_s(is_right(after, new)),
        "new": float(is_right(late, new).mean()),
        "new_motion": adherence(late, new)["motion"],
        "change": change_at(frames, border),
        "step_px": float(np.nanmax(steps)) if np.isfinite(steps).any() else None,
    }


def all_there_s(right: np.ndarray, at_once: int = FPS // 2) -> float:
    """Seconds until `at_once` frames in a row are `right`; all of them where that never is."""
    for first in range(len(right) - at_once + 1):
        if right[first : first + at_once].all():
            return first / FPS
    return len(right) / FPS


def report(records: Records) -> str:
    kinds = {method: [f"{transition}, {method}" for transition in METHODS[method]] for method in METHODS}
    found = [f"## {method}\n\n" + records.tables(kinds[method], COLUMNS, f"{SAME}, {method}") for method in METHODS]
    for transition in ("switch", "blend"):
        of_all = [f"{transition}, {method}" for method in METHODS]
        found.append(f"## {transition}\n\n" + records.tables(of_all, COLUMNS, f"{transition}, {DEFAULT}"))
    return "\n\n".join(found)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("transitions"), help="folder of the records")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--report_only", action="store_true", help="make nothing new, print the tables again")
    options = parser.parse_args(argv)
    records = Records(options.out / "transitions.jsonl")
    wanted = [
        (method, transition, pair)
        for method in options.methods
        for pair in prompt_pairs(options.pairs)
        for transition in METHODS[method]
        if not records.has(f"{transition}, {method}", pair)
    ]
    if wanted and not options.report_only:
        print(hardware(), flush=True)
        with tempfile.TemporaryDirectory() as folder, Engine("pocket", outputs=Path(folder), threads=1) as engine:
            for method, transition, pair in wanted:
                records.add(f"{transition}, {method}", pair, measure(make(engine, method, transition, pair), pair, transition))
    print(report(records))


if __name__ == "__main__":
    main()
