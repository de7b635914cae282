"""How a film goes on from another, and from a picture, by Pocket Wan: what each way of showing the first block the end of the
first film does to the join, five continuations in a row, and a picture as the beginning.

    python -m benchmarks.continuing [--pairs 24] [--out continuing] [--report_only]

A film of 24 latents is continued by 16 with the same prompt (and once with another that shares no word with it); blocks of
8 + 8, the preset's steps and schedule. Ways, by what the first block sees of the first film's last 8 latents at its step s:

* no ghost: nothing; the second film is one of its own.
* clean: the latents themselves. one noise: the latents at the block's noise level, with the same noise in all steps. new noise:
  with new noise in each step; it is what `continue_from` does.
* re-encoded: new noise, but latents that the VAE made of the first film's mp4 instead of those that were kept.

"part 1" to "part 5" are continuations of 16 latents, each of the one before. A picture is the first frame of a rendered scene
of the prompt; "no picture" is the first film. Columns: change of the picture at the join over the film's median change; jumps
there over those at other borders between latents (position, velocity, size, colour: `dualparal/pocket/judge.py`); of the new
part: share of frames with the prompt's shape and colours, its motion in the last three seconds, palette error, and size over
the first film's. Of a picture: how far the first frame is from it (0 to 1), and the largest change in the eight frames after it
over the median. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image

from benchmarks.common import hardware
from benchmarks.pairs import THREE_SECONDS, Pair, Record, Records, change_at, frames_of, is_right, prompt_pairs
from benchmarks.vae_dtype import normalised_latents
from dualparal import Engine, GenerationRequest
from dualparal.files import END_LATENTS
from dualparal.model.source import find_checkpoint
from dualparal.model.vae import StreamingDecoder
from dualparal.pocket.judge import jumps, palette_error
from dualparal.pocket.metrics import adherence, read_frames
from dualparal.pocket.world import Prompt, random_scene
from dualparal.ring.tensor_files import write_tensors

LATENTS, MORE = 24, 16
NUM_PARTS = 5
GHOST_FILE = "DUALPARAL_BENCH_GHOST"  # names the file that says how the ghost is seen
PLAIN, NO_GHOST, NEW_PROMPT, NO_PICTURE = "new noise", "no ghost", "new noise, new prompt", "no picture"
WAYS = {NO_GHOST: "new", "clean": "clean", "one noise": "one", PLAIN: "new", "re-encoded": "new", NEW_PROMPT: "new"}
PICTURES = {"picture": "new", "picture, clean": "clean"}
ROW = [f"part {number}" for number in range(1, NUM_PARTS + 1)]
JUMPS = [(f"jump, {name}", f"jump_{name}") for name in ("position", "velocity", "size", "color")]
OF_A_PART = [
    ("right frames", "right"), ("motion", "motion"), ("palette error", "palette"), ("size", "size"),
]  # fmt: skip
COLUMNS = [("change", "change"), *JUMPS, *OF_A_PART]


def ghosts(*, rank: int | None, **_: Any) -> None:
    """A worker hook: the ghost is seen as the file says, "new", "one" or "clean"."""
    if rank != 0:
        return
    from dualparal.method.noise import Ghost

    seen_at = Ghost.seen_at

    def seen_so(self: Ghost, step: int) -> torch.Tensor:
        way = Path(os.environ[GHOST_FILE]).read_text()
        if way == "clean":
            return self._latents
        if way == "new":
            return seen_at(self, step)
        sigma = self._sigmas[step]
        noise = (seen_at(self, 0) - (1 - self._sigmas[0]) * self._latents) / self._sigmas[0]
        return (1 - sigma) * self._latents + sigma * noise

    Ghost.seen_at = seen_so  # type: ignore[method-assign]


class Studio:
    """Makes the films of one pair."""

    def __init__(self, engine: Engine, outputs: Path, ghost_file: Path, decoder: StreamingDecoder) -> None:
        self._engine, self._outputs, self._ghost_file, self._decoder = engine, outputs, ghost_file, decoder

    def film(self, prompt: Prompt, latents_num: int, *, seed: int, ghost: str = "new", **more: Any) -> tuple[str, np.ndarray]:
        """(job, frames)."""
        self._ghost_file.write_text(ghost)
        request = GenerationRequest(
            prompt=prompt.caption, latents_num=latents_num, seed=seed, num_per_block=8, num_cat=8, **more
        )  # fmt: skip
        return frames_of(self._engine, request)

    def encode_again(self, job_id: str) -> None:
        """Put latents of the job's mp4 in the place of those that were kept."""
        folder = self._outputs / job_id
        film = imageio_ffmpeg.read_frames(folder / "video.mp4", pix_fmt="rgb24")
        width, height = next(film)["size"]
        frames = np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in film])
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        write_tensors(
            folder / END_LATENTS, {"latents": normalised_latents(self._decoder.vae, clip)}, {"num_frames": str(len(frames))}
        )

    def scene(self, prompt: Prompt, seed: int) -> Path:
        """A picture of the prompt."""
        picture = random_scene(prompt, np.random.default_rng(seed)).render(1)[0]
        file = self._outputs / "scene.png"
        Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(file)
        return file


def measure(frames: np.ndarray, start: int, stop: int, prompt: Prompt, *, first_area: float = 0.0) -> Record:
    """The columns of the part from frame `start` to `stop`, and of the join before it."""
    reading = read_frames(frames)
    part = reading.part(start, stop)
    found: Record = {"change": change_at(frames, start) if start else None}
    for name, (border, inside) in jumps(reading, [start] if start else []).items():
        is_there = start > 0 and np.isfinite(border).any() and np.isfinite(inside).any()
        found[f"jump_{name}"] = [float(np.nanmean(border)), float(np.nanmean(inside))] if is_there else None
    found["right"] = float(is_right(part, prompt).mean())
    last = part.part(max(0, stop - start - THREE_SECONDS), stop - start)
    found["motion"] = adherence(last, prompt)["motion"]
    found["palette"] = float(palette_error(part, prompt).mean())
    found["size"] = float(part.area_px.mean() / first_area) if first_area else None
    return found


def measure_pair(studio: Studio, records: Records, pair: Pair, number: int) -> None:
    """All films of one pair that the records lack."""
    prompt, other = pair
    seed = 2 * number
    film, frames = studio.film(prompt, LATENTS, seed=seed)
    area = float(read_frames(frames).area_px.mean())
    border = len(frames)

    def join(more: np.ndarray, shown: Prompt) -> Record:
        whole = np.concatenate([frames, more])
        return measure(whole, border, len(whole), shown, first_area=area)

    if not records.has(NO_PICTURE, pair):
        records.add(NO_PICTURE, pair, measure(frames, 0, border, prompt))
    for kind, ghost in PICTURES.items():
        if not records.has(kind, pair):
            picture = studio.scene(prompt, seed)
            shown = studio.film(prompt, LATENTS, seed=seed, ghost=ghost, start_image=str(picture))[1]
            records.add(kind, pair, {**measure(shown, 0, len(shown), prompt), **of_picture(shown, picture)})
    goes_on = [kind for kind in WAYS if kind != "re-encoded" and not records.has(kind, pair)]
    for kind in goes_on:
        shown = other if kind == NEW_PROMPT else prompt
        of = {} if kind == NO_GHOST else {"continue_from": film}
        records.add(kind, pair, join(studio.film(shown, MORE, seed=seed + 1, ghost=WAYS[kind], **of)[1], shown))
    if not records.has(ROW[-1], pair):
        previous, whole = film, frames
        for part in ROW:
            previous, more = studio.film(prompt, MORE, seed=seed + 1 + ROW.index(part), continue_from=previous)
            whole = np.concatenate([whole, more])
            found = measure(whole, len(whole) - len(more), len(whole), prompt, first_area=area)
            if not records.has(part, pair):
                records.add(part, pair, found)
    if not records.has("re-encoded", pair):
        studio.encode_again(film)
        records.add("re-encoded", pair, join(studio.film(prompt, MORE, seed=seed + 1, continue_from=film)[1], prompt))


def of_picture(frames: np.ndarray, picture: Path) -> Record:
    """How far the film's first frame, and the eight after it, are from the picture and from each other, in 0 .. 1."""
    drawn = np.asarray(Image.open(picture)).astype(float)
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    return {
        "from_picture": float(np.abs(frames[0] - drawn).mean() / 255),
        "change": float(change[:8].max() / np.median(change)),
    }


def report(records: Records) -> str:
    return "\n\n".join(
        [
            records.tables(list(WAYS), COLUMNS, PLAIN),
            records.tables(ROW, COLUMNS, ROW[0]),
            records.tables(
                [NO_PICTURE, *PICTURES],
                [*OF_A_PART[:3], ("from the picture", "from_picture"), ("change", "change")],
                NO_PICTURE,
            ),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("continuing"), help="folder of the records")
    parser.add_argument("--report_only", action="store_true", help="make nothing new, print the tables again")
    options = parser.parse_args(argv)
    records = Records(options.out / "continuing.jsonl")
    kinds = [*WAYS, *PICTURES, *ROW, NO_PICTURE]
    wanted = [
        (number, pair)
        for number, pair in enumerate(prompt_pairs(options.pairs))
        if not all(records.has(kind, pair) for kind in kinds)
    ]
    if wanted and not options.report_only:
        print(hardware(), flush=True)
        decoder = StreamingDecoder.load(find_checkpoint("pocket"), device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            ghost_file = Path(folder) / "ghost"
            os.environ[GHOST_FILE] = str(ghost_file)
            outputs = Path(folder) / "films"
            outputs.mkdir()
            with Engine("pocket", outputs=outputs, threads=1, worker_hook="benchmarks.continuing:ghosts") as engine:
                studio = Studio(engine, outputs, ghost_file, decoder)
                for number, pair in wanted:
                    measure_pair(studio, records, pair, number)
    print(report(records))


if __name__ == "__main__":
    main()
