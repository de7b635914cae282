"""How a new prompt takes over: films of two shots by Pocket Wan, for every transition and for one prompt throughout, and films
that go on from another (`continue_from`), with the new prompt and with the same.

    python -m benchmarks.transitions [--pairs 4] [--latents 20] [--schedule paper] [--context cached]

Pairs of held-out prompts that share no word but "a", "on" and "background". Told per transition, means over the pairs: the
share of frames with colour, shape and background of the first prompt in the second before the border, and of the second prompt
in each second after it; whether the second prompt's motion is seen from two seconds after the border on; and the change of
picture at the border over the film's median change from frame to frame.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.pocket.metrics import adherence, read_frames
from dualparal.pocket.world import Prompt, held_out_prompts

FPS = 16
AFTER_S = 5
SAME = ("same prompt", "same, continued")
CONTINUED = ("continued", "same, continued")
KINDS = ("switch", "blend", "cut", "same prompt", *CONTINUED)


def prompt_pairs(num_pairs: int) -> list[tuple[Prompt, Prompt]]:
    """Neighbours in a shuffled list that have nothing in common."""
    shuffled = np.random.default_rng(2).permutation(np.array(held_out_prompts(), dtype=object))
    pairs = [
        (one, other)
        for one, other in pairwise(shuffled)
        if not {one.color, one.shape, one.motion, one.background} & {other.color, other.shape, other.motion, other.background}
    ]
    return pairs[:num_pairs]


def make(engine: Engine, kind: str, pair: tuple[Prompt, Prompt], options: argparse.Namespace) -> np.ndarray:
    """Frames [F, 64, 64, 3] uint8."""
    is_same = kind in SAME
    if kind in CONTINUED:
        return make_continued(engine, pair[0], pair[not is_same], options)
    shots = [{"prompt": pair[0].caption, "latents_num": options.latents}]
    shots += [
        {"prompt": pair[not is_same].caption, "latents_num": options.latents, "transition": "switch" if is_same else kind}
    ]
    request = GenerationRequest(
        shots=shots, seed=1, num_per_block=8, num_cat=8, schedule=options.schedule, context=options.context
    )  # fmt: skip
    return frames_of(engine, request)[1]


def frames_of(engine: Engine, request: GenerationRequest) -> tuple[str, np.ndarray]:
    """(the job, its frames)."""
    job = engine.submit(request, export_images=True)
    job.result()
    return job.id, np.stack([np.asarray(Image.open(path)) for path in sorted((job.folder.path / "frames").glob("*.png"))])


def make_continued(engine: Engine, first: Prompt, second: Prompt, options: argparse.Namespace) -> np.ndarray:
    """Two films as one, the second with noise of its own."""
    rules = {"num_per_block": 8, "num_cat": 8, "schedule": options.schedule, "context": options.context}
    rules |= {"latents_num": options.latents}
    film, frames = frames_of(engine, GenerationRequest(prompt=first.caption, seed=1, **rules))
    more = frames_of(engine, GenerationRequest(prompt=second.caption, seed=2, continue_from=film, **rules))[1]
    return np.concatenate([frames, more])


def shown(frames: np.ndarray, prompt: Prompt) -> float:
    """Share of frames with the prompt's colour, shape and background."""
    reading = read_frames(frames)
    found = [(np.array(reading.color) == prompt.color), (np.array(reading.shape) == prompt.shape)]
    return float(np.mean(np.logical_and.reduce([*found, np.array(reading.background) == prompt.background])))


def measure(frames: np.ndarray, pair: tuple[Prompt, Prompt], kind: str, options: argparse.Namespace) -> list[float]:
    border = 4 * options.latents - 3
    new = pair[kind not in SAME]
    marks = [shown(frames[border - FPS : border], pair[0])]
    marks += [shown(frames[border + FPS * second :][:FPS], new) for second in range(AFTER_S)]
    late = read_frames(frames[border + 2 * FPS :])
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    return [*marks, adherence(late, new)["motion"], float(change[border - 1] / np.median(change))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--latents", type=int, default=20, help="of each shot")
    parser.add_argument("--schedule", default="paper")
    parser.add_argument("--context", default="cached")
    options = parser.parse_args(argv)
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    heads = ["old, last second", *(f"new, {second}-{second + 1} s" for second in range(AFTER_S)), "new motion", "change"]
    print(hardware(), f"{options.schedule}, {options.context}, blocks 8 + 8, {options.latents} latents a shot", sep="\n")
    with tempfile.TemporaryDirectory() as folder, Engine("pocket", outputs=Path(folder), threads=1) as engine:
        for number, pair in enumerate(prompt_pairs(options.pairs), 1):
            for kind, rows in found.items():
                rows.append(measure(make(engine, kind, pair, options), pair, kind, options))
            print(f"\n{number} pairs", flush=True)
            print(table(["", *heads], [[kind, *(f"{x:.2f}" for x in np.mean(rows, axis=0))] for kind, rows in found.items()]),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
