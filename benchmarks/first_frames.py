"""When a film starts to play and whether it ever stalls: the pocket model on a warm engine, by schedule.

A film that is played from its first block on stalls where a block is not decoded when its first frame is due. Seconds are of
this machine; the share of the work before the first block is the schedule's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.events import BlockReady
from dualparal.presets import load_presets
from dualparal.request import Settings

METHODS: dict[str, dict[str, Any]] = {
    "the preset's own": {},
    "paper, cached context": {"schedule": "paper", "context": "cached"},
    "paper, recomputed context": {"schedule": "paper", "context": "recomputed"},
    "pocket-fast's own": {},
}
PRESETS = {"pocket-fast's own": "pocket-fast"}


@dataclass(frozen=True)
class Film:
    """Seconds from Generate: to the first frames, to all of them; `stalled_s`: how long playing waits, from the first on."""

    first_s: float
    total_s: float
    stalled_s: float


def made(engine: Engine, request: GenerationRequest | Settings) -> Film:
    """Make one film and note when each block is there."""
    started_s = time.monotonic()
    job = engine.submit(request)
    ready = [(time.monotonic() - started_s, event) for event in job.events() if isinstance(event, BlockReady)]
    total_s = time.monotonic() - started_s
    return Film(ready[0][0], total_s, stalled_s([(at_s, event.first_frame / job.request.fps) for at_s, event in ready]))


def stalled_s(blocks: list[tuple[float, float]]) -> float:
    """How long a film stands still in all that plays from its first block on; each block is (ready, its place), in seconds."""
    return max(at_s - place_s for at_s, place_s in blocks) - blocks[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the film")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--times", type=int, default=3, help="films of each kind, by turns; the median counts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    options = parser.parse_args()
    print(hardware(), f"{options.seconds:g} s of film, {options.ranks} ranks of one thread", sep="\n", flush=True)
    films: dict[str, list[Film]] = {name: [] for name in options.methods}
    with (
        tempfile.TemporaryDirectory() as outputs,
        Engine("pocket", ranks=options.ranks, device="cpu", threads=1, outputs=outputs) as engine,
    ):
        request = GenerationRequest(prompt="a red circle bouncing on a navy background", seconds=options.seconds, seed=0)
        made(engine, request.model_copy(update={"seconds": 2.0}))
        orders = {}
        for _ in range(options.times):
            for name in films:
                preset = load_presets()[PRESETS.get(name, "pocket")]
                settings = engine.resolve(request.model_copy(update=METHODS[name]), preset)
                films[name].append(made(engine, settings))
                in_flight = min(settings.max_in_flight, engine.plan(settings).workload.schedule.num_in_flight())
                orders[name] = (f"{in_flight} x {settings.stagger}", f"{engine.plan(settings).first_share:.0%}")
    rows = []
    for name, each in films.items():
        medians = [statistics.median(getattr(film, field) for film in each) for field in ("first_s", "total_s", "stalled_s")]
        speed = options.seconds / medians[1]
        rows.append([name, *orders[name], *(f"{value:.1f}" for value in medians), f"{speed:.1f}"])
    head = [
        "order", "in flight x stagger", "work before the first block", "first frames s", "total s", "stalls s",
        "s of film a second",
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
