"""The early look: what it costs a run, and after which share of a run it shows what the film will be.

`cost`: pocket jobs by turns with and without looks on one engine: seconds, processor time spent on looks, and whether the
latents are the same bits. `--reps` of each.

`share`: films of held-out prompts whose every step is looked at. A film is recognisable from the step on after which the pocket
model's own judge reads its colour, its background and its motion right from the looks of its blocks at that step, to the end;
the first second by the first block alone. When the blocks are at that step follows from the event model, so that any number of
ranks can be told.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.events import Look
from dualparal.media.rough import pack, shrink, unpack
from dualparal.method.event_model import even_cost, forecast
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import make_schedule
from dualparal.pocket.metrics import Reading, classify_motion, read_frames, velocities
from dualparal.pocket.world import BACKGROUNDS, COLORS, SIDE_PX, Prompt, held_out_prompts
from dualparal.request import TEMPORAL_FACTOR, Settings
from dualparal.ring import looks

OFF = "DUALPARAL_BENCH_NO_LOOKS"  # names a file; while it is there no look is made
ORDER = ("bouncing", "moving right", "circling", "moving up", "moving left", "moving down")
WINDOW, ENOUGH = 48, 0.9  # frames in which a motion is read; the share of them in which it is right
SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "paper"},
    "preview, 5 in flight": {"schedule": "preview", "max_in_flight": 5},
}


def with_switch(*, rank: int | None, **parts: Any) -> dict[str, Any]:
    """Worker hook: no map, and so no look, while the file is there."""
    find = parts.get("find_map")
    return {"find_map": lambda: None if Path(os.environ[OFF]).exists() else find()} if rank == 0 and find else {}


def of_every_step(*, rank: int | None, **_: Any) -> None:
    """Worker hook: every step is looked at, and rank 0 waits for it."""
    see = looks.Looks.see

    def see_all(self: looks.Looks, *step: Any) -> None:
        see(self, *step)
        while self._newest:
            time.sleep(0.001)

    looks.Looks.see = see_all  # type: ignore[method-assign]
    looks.looked_at = lambda num_steps: frozenset(range(1, num_steps + 1))  # type: ignore[assignment]
    looks.AHEAD_S = 1e9


def cost(reps: int, ranks: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        switch = Path(folder) / "off"
        os.environ[OFF] = str(switch)
        rows: dict[bool, list[list[float]]] = {True: [], False: []}
        digests = set()
        hook = "benchmarks.early_look:with_switch"
        with Engine("pocket", ranks=ranks, device="cpu", threads=1, outputs=folder, worker_hook=hook) as engine:
            for number in range(2 * reps + 1):
                switch.unlink(missing_ok=True) if number % 2 else switch.touch()
                before_s = workers_s()
                job = engine.submit(GenerationRequest(prompt=PROMPT, seconds=seconds, seed=1), return_latents=True)
                result = job.result()
                assert result.latents is not None
                worked_s = workers_s() - before_s
                digests.add(hashlib.sha256(result.latents.numpy().tobytes()).hexdigest())
                if number:  # the first one warms up
                    num_bytes = statistics.mean(len(look.picture) for look in job.view().looks.values())
                    rows[bool(number % 2)].append(
                        [*(result.timings[name] for name in ("denoise_s", "total_s", "look_s")), num_bytes, worked_s]
                    )
        frames = np.random.default_rng(0).integers(0, 255, (32, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        began_s = time.process_time()
        for _ in range(100):
            pack(shrink(frames))
        packed_s = (time.process_time() - began_s) / 100
        medians = {is_on: [statistics.median(column) for column in zip(*found, strict=True)] for is_on, found in rows.items()}
        print(table(
            ["looks", "denoise s", "whole job s", "workers' processor s", "of them on looks", "share"],
            [["on" if is_on else "off", *(f"{value:.2f}" for value in found[:2]), f"{found[4]:.2f}", f"{found[2]:.3f}",
              f"{100 * found[2] / found[4]:.2f} %"] for is_on, found in medians.items()],
        ))  # fmt: skip
        pairs = [on[4] / off[4] for on, off in zip(rows[True], rows[False], strict=True)]
        over = [medians[True][column] / medians[False][column] for column in (4, 0)]
        print(f"on over off: {over[0]:.4f} of the processor time (pairs {min(pairs):.4f} to {max(pairs):.4f}), {over[1]:.4f} "
              "of the time of denoising")  # fmt: skip
        print(f"the last look of each block, of its frames, takes the codec {1000 * packed_s:.2f} ms; looks on disk "
              f"{medians[True][3] / 1000:.1f} kB a block; latents the same bits: {len(digests) == 1}")  # fmt: skip


def workers_s() -> float:
    """Processor seconds of the engine's workers so far, which other work on the machine does not lengthen."""
    spent = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in spent)


PROMPT = "a red circle bouncing on a navy background"


def is_recognisable(pictures: np.ndarray, prompt: Prompt) -> bool:
    """Whether the judge reads colour, background and motion of `prompt` from one picture per latent frame. Colours are named
    for the film: the name nearest to the median of its pictures, since what is blurred is far from every pure colour."""
    found = read_frames(pictures)
    if not found.is_seen.any():
        return False
    named = [
        nearest(np.nanmedian(found.color_rgb, axis=0), COLORS),
        nearest(np.median(found.background_rgb, axis=0), BACKGROUNDS),
    ]
    track = between(found)
    starts = range(0, max(1, len(track) - WINDOW + 1), WINDOW // 2)
    motions = [classify_motion(track[start : start + WINDOW]) == prompt.motion for start in starts]
    return named == [prompt.color, prompt.background] and np.mean(motions) >= ENOUGH


def nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    table_rgb = np.asarray(list(names.values())) / 255
    return list(names)[int(np.linalg.norm(table_rgb - rgb, axis=1).argmin())]


def between(reading: Reading) -> np.ndarray:
    """The object's track frame by frame, [frames, 2], straight from each latent's place to the next."""
    steps = np.repeat(velocities(reading.center_px) / TEMPORAL_FACTOR, TEMPORAL_FACTOR, axis=0)
    return np.asarray((reading.center_px[0] + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])) % SIDE_PX)


def recognised_at(seen: list[dict[int, np.ndarray]], prompt: Prompt) -> int | None:
    """The number of steps after which a film of blocks is recognisable and stays so; `seen` are each block's pictures by step.
    None: it never is."""
    first = None
    for step in sorted(seen[0]):
        pictures = np.concatenate([block[step] for block in seen])
        first = (first or step) if is_recognisable(pictures, prompt) else None
    return first


def share(num_prompts: int, steps: list[int], ranks: list[int], latents_num: int) -> None:
    rows: list[list[Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine("pocket", device="cpu", threads=1, outputs=folder, worker_hook="benchmarks.early_look:of_every_step") as engine,
    ):
        for num_steps in steps:
            for name, fields in SCHEDULES.items():
                if "max_in_flight" in fields:
                    fields = {**fields, "stagger": max(1, num_steps // fields["max_in_flight"])}
                found = []
                for seed, prompt in enumerate(prompts_of_several_motions(num_prompts)):
                    request = GenerationRequest(
                        prompt=prompt.caption, latents_num=latents_num, num_per_block=8, num_cat=8, context="cached", seed=seed,
                        num_inference_steps=num_steps, **fields,
                    )  # fmt: skip
                    settings = engine.resolve(request)
                    seen = watch(engine, settings)
                    found.append((recognised_at(seen[:1], prompt), recognised_at(seen, prompt)))
                rows += [row_of(name, settings, found, number) for number in ranks]
                print(rows[-1], flush=True)
    print(table(["order", "steps", "ranks", "first second: after steps", "of the run", "whole film: after steps", "of the run",
                 "first block plays"], rows))  # fmt: skip


def prompts_of_several_motions(num: int) -> list[Prompt]:
    """Held-out prompts whose motions take turns."""
    by_motion = {motion: [prompt for prompt in held_out_prompts() if prompt.motion == motion] for motion in ORDER}
    return [by_motion[ORDER[n % len(ORDER)]][n // len(ORDER)] for n in range(num)]


def watch(engine: Engine, settings: Settings) -> list[dict[int, np.ndarray]]:
    """Make the film; of each block its pictures after every step."""
    seen: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    job = engine.submit(settings)
    take = job.show

    def remember(look: Look) -> None:
        if look.step not in seen[look.block]:  # the last one comes of the block's frames too
            seen[look.block][look.step] = unpack(look.picture)
        take(look)

    job.show = remember  # type: ignore[method-assign]
    job.result()
    assert all(len(seen[block]) == settings.num_inference_steps for block in range(plan_of(settings).num_blocks))
    return [seen[block] for block in range(plan_of(settings).num_blocks)]


def row_of(name: str, settings: Settings, found: list[tuple[int | None, int | None]], ranks: int) -> list[Any]:
    """A row: the median and the largest number of steps over the films, and the shares of a run by the event model."""
    plan, num_steps = plan_of(settings), settings.num_inference_steps
    schedule = make_schedule(rules_of(settings), plan, (0,) * num_steps)
    model = forecast(schedule, ranks, even_cost(schedule, ranks))
    row: list[Any] = [name, num_steps, ranks]
    for blocks, needed in ((range(1), [first for first, _ in found]), (range(plan.num_blocks), [whole for _, whole in found])):
        steps = sorted(num_steps if step is None else step for step in needed)
        never = sum(step is None for step in needed)
        marks = [steps[(len(steps) - 1) // 2], steps[-1]]
        shares = [max(model.step_done[block, mark] for block in blocks) / model.total for mark in marks]
        row.append(f"{marks[0]}, at most {marks[1]}" + (f" ({never} of {len(needed)} never)" if never else ""))
        row.append(", at most ".join(f"{100 * value:.0f} %" for value in shares))
    return [*row, f"{100 * model.first_block / model.total:.0f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.early_look", description=__doc__)
    parser.add_argument("what", choices=("cost", "share"))
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--latents", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(hardware(), flush=True)
    if options.what == "cost":
        cost(options.reps, options.ranks[0], options.seconds)
    else:
        share(options.prompts, options.steps, options.ranks, options.latents)


if __name__ == "__main__":
    main()
