"""What it costs that a job can go on where it was cut off: saving state at sweep borders, and `refresh` of cached context.

A job that denoises for `--seconds` offers a border to save at every sweep of `--sweep_s`; what `StateWriter` then spends is
set against the whole. The rest of the time stands for denoising, so the share is that of a thread beside it: an upper bound.
What the default `refresh` adds by the schedule's window frames is counted (`--plans`), attention left out.
Pocket films (`--films`) are made with the default `refresh` and with none, by turns; processor seconds of the rank, its saving
included, are compared, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.method.borders import borders
from dualparal.method.event_model import even_cost, forecast
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Schedule, make_schedule
from dualparal.presets import complete, load_presets
from dualparal.request import Settings
from dualparal.ring.saved_sweeps import StateWriter, SweepState, write_sweep

SAMPLER_TENSORS = 3  # two past predictions and the last sample
CASES = {  # name: (blocks in flight, latent frames of a block, latent height, latent width)
    "32x32, paper, 12 in flight": (12, 4, 4, 4),
    "480x832, preview, 3 in flight": (3, 8, 60, 104),
    "480x832, preview, 5 in flight": (5, 8, 60, 104),
    "480x832, preview, 8 in flight": (8, 8, 60, 104),
    "480x832, paper, 50 in flight": (50, 8, 60, 104),
}


def border(num_blocks: int, num_frames: int, height: int, width: int) -> SweepState:
    """A state of the size it would have between two sweeps; neighbours' ends are half a block each."""

    def some(frames: int) -> torch.Tensor:
        return torch.randn(1, 16, frames, height, width)

    return SweepState(
        next_index=1,
        num_finished=0,
        latents={block: some(num_frames) for block in range(num_blocks)},
        counts={block: {"step": 1} for block in range(num_blocks)},
        samplers={block: {f"x{n}": some(num_frames) for n in range(SAMPLER_TENSORS)} for block in range(num_blocks)},
        tails={(block, 1): some(num_frames // 2) for block in range(num_blocks)},
    )


def share_of(state: SweepState, seconds: float, sweep_s: float, folder: Path) -> tuple[float, int]:
    """(share of the time spent saving, saves) of a job of `seconds` with a border every `sweep_s`."""
    writer, num_saved, started_s = StateWriter(folder), 0, time.monotonic()
    while time.monotonic() - started_s < seconds:
        if writer.wants_sweep():
            writer.save_sweep(state)
            num_saved += 1
        time.sleep(sweep_s)
    total_s = time.monotonic() - started_s
    writer.close()
    return writer.seconds / total_s, num_saved


PLANS = (  # num_cat, steps, latent frames, blocks in flight x stagger (None: `paper`)
    (4, 20, 81, None), (4, 50, 245, None), (4, 50, 245, (5, 10)), (8, 20, 81, (5, 4)), (8, 50, 245, None),
    (8, 50, 245, (3, 17)),
)  # fmt: skip


def planned_costs() -> list[list[str]]:
    """Rows: what the default `refresh` adds in window frames and in time on four ranks, and where a job can be saved."""
    rows = []
    for num_cat, steps, latents_num, in_flight in PLANS:
        asked = GenerationRequest(
            prompt="any", num_inference_steps=steps, latents_num=latents_num, num_per_block=8, num_cat=num_cat,
            context="cached", schedule="preview" if in_flight else "paper",
            max_in_flight=in_flight and in_flight[0], stagger=in_flight and in_flight[1],
        )  # fmt: skip
        settings = complete(asked, load_presets()["pocket"], ranks=4)
        with_it, without = (
            make_schedule(replace(rules_of(settings), refresh=refresh), plan_of(settings), (0,) * steps)
            for refresh in (settings.refresh, 0)
        )
        frames = sum_frames(with_it) / sum_frames(without) - 1
        seconds = [forecast(schedule, 4, even_cost(schedule, 4)).total for schedule in (with_it, without)]
        rows.append([
            f"8 + {num_cat}, {steps}, {latents_num}", str(settings.refresh),
            f"{in_flight[0]} in flight x {in_flight[1]}" if in_flight else "`paper`", f"{100 * frames:.1f} %",
            f"{100 * (seconds[0] / seconds[1] - 1):.1f} %",
            f"{len(list(borders(with_it)))} in {with_it.items[-1].sweep + 1} sweeps",
        ])  # fmt: skip
    return rows


def sum_frames(schedule: Schedule) -> int:
    """Latent frames that all items of the schedule run through the layers."""
    return sum(sum(schedule.window_frames(item)) for item in schedule.items)


def window_frames(request: Settings) -> int:
    """`sum_frames` of a request's schedule."""
    return sum_frames(make_schedule(rules_of(request), plan_of(request), (0,) * request.num_inference_steps))


def refresh_costs(num_films: int, seconds: float) -> list[list[str]]:
    """Rows: blocks, `refresh`, window frames and processor seconds more than without."""
    rows = []
    with tempfile.TemporaryDirectory() as outputs, Engine("pocket", device="cpu", threads=1, outputs=outputs) as engine:
        rank = psutil.Process(next(about["pid"] for name, about in engine.workers.items() if name.startswith("rank")))
        for num_cat in (8, 4):
            request = GenerationRequest(prompt="a red circle", seconds=seconds, num_cat=num_cat, seed=0)
            settings, never = (engine.resolve(request.model_copy(update={"refresh": refresh})) for refresh in (None, 0))
            spent: dict[int, list[float]] = {settings.refresh: [], 0: []}
            engine.submit(never).result()
            for turn in range(2 * num_films):
                asked = (settings, never)[(turn + turn // 2) % 2]  # a b b a
                before = sum(rank.cpu_times()[:2])
                engine.submit(asked).result()
                spent[asked.refresh].append(sum(rank.cpu_times()[:2]) - before)
            with_it, without = (statistics.median(spent[refresh]) for refresh in (settings.refresh, 0))
            frames = window_frames(settings) / window_frames(never) - 1
            order = f"{settings.schedule}, {settings.max_in_flight} x {settings.stagger}"
            rows.append([
                f"8 + {num_cat}, {order}", str(settings.refresh), f"{100 * frames:.1f} %",
                f"{with_it:.2f} and {without:.2f}", f"{100 * (with_it / without - 1):+.1f} %",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each make-believe job")
    parser.add_argument("--sweep_s", type=float, default=0.5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases, the smallest first")
    parser.add_argument("--films", type=int, default=0, help="pocket films with and without refresh, of each kind of block")
    parser.add_argument("--film_s", type=float, default=20.0, help="length of each")
    parser.add_argument("--plans", action="store_true", help="count what the default refresh adds, and nothing else")
    options = parser.parse_args()
    if options.plans:
        head = ["blocks, steps, latents", "`refresh`", "order", "more work", "more time, 4 ranks", "borders"]
        print(table(head, planned_costs()))
        return
    print(hardware(), flush=True)
    rows = []
    for name, shape in list(CASES.items())[: options.cases]:
        state = border(*shape)
        with tempfile.TemporaryDirectory() as folder:
            started_s = time.monotonic()
            write_sweep(Path(folder), state)
            save_s = time.monotonic() - started_s
            size = (Path(folder) / "sweep.safetensors").stat().st_size
            share, num_saved = share_of(state, options.seconds, options.sweep_s, Path(folder))
        rows.append([name, f"{size / 1e6:.1f}", f"{save_s:.3f}", num_saved, f"{100 * share:.2f} %"])
        print(rows[-1], flush=True)
    if rows:
        print(table(["state", "MB", "s per save", f"saves in {options.seconds:.0f} s", "share of the time"], rows))
    if options.films:
        head = ["blocks, order", "refresh", "more window frames", "rank's processor s, with and without", "more"]
        print(table(head, refresh_costs(options.films, options.film_s)))


if __name__ == "__main__":
    main()
