"""The event model against the engine: first block, total and busy share, predicted and run.

The stages sleep for as long as their work would take (`timed_stage.py`), so any number of ranks runs as it would on as many
devices; queues, messages, samplers and the order of work are the engine's own. Nothing is fitted: the forecast knows the
sleeps and nothing else. What is off is therefore the engine's own time and the machine's (processes that wake up late): in
virtual time, without either, model and engine agree to the last digit (tests/method/test_event_model.py). Stages of real models
work for seconds a step; the default is long enough for the engine's one or two milliseconds to weigh little.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import checkpoint, hardware, table
from benchmarks.timed_stage import FORWARD_MS
from dualparal import Engine, GenerationRequest, Settings
from dualparal.method.event_model import Forecast, even_cost, forecast
from dualparal.method.grid import Grid
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import make_schedule

METHODS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, micro-batches": {"micro_batches": True},
    "preview": {"schedule": "preview"},
    "preview, cached context": {"schedule": "preview", "context": "cached"},
}


def predicted(request: Settings, grid: Grid, forward_s: float) -> Forecast:
    """What the event model says of a settled request, in seconds."""
    schedule = make_schedule(rules_of(request), plan_of(request), (0,) * request.num_inference_steps)
    cost = even_cost(schedule, grid.stages)
    return forecast(schedule, grid.stages, lambda item, rank: cost(item, rank) * forward_s, rings=grid.guidance)


def measured(folder: Path, num_steps: int) -> Forecast:
    """The same from a finished job's timeline, counted from the first block step on."""
    spans = [s for s in json.loads((folder / "timeline.json").read_text()) if s["stage"].startswith("stage ")]
    start = min(span["start_s"] for span in spans)
    last_steps = [s for s in spans if s["step"] == num_steps - 1]
    done = {s["block"]: max(o["end_s"] for o in last_steps if o["block"] == s["block"]) - start for s in last_steps}
    total = max(done.values())
    stages = sorted({span["stage"] for span in spans})
    busy = [sum(s["end_s"] - s["start_s"] for s in spans if s["stage"] == stage) / total for stage in stages]
    return Forecast(tuple(done[block] for block in sorted(done)), total, tuple(busy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--guidance_parallel", type=int, default=1, choices=(1, 2), help="rings that the ranks form")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--forward-ms", type=float, default=400.0, help="an ordinary block step over all layers")
    options = parser.parse_args()
    os.environ[FORWARD_MS] = str(options.forward_ms)
    folder = checkpoint("four-layers", num_layers=4)
    base = GenerationRequest(
        prompt="event model", latents_num=4 * options.blocks + 4, num_per_block=4, num_cat=4,
        num_inference_steps=options.steps, height=32, width=32, seed=0, guidance_scale=5.0,
        schedule="paper", context="recomputed",
    )  # fmt: skip
    print(hardware(), f"{options.blocks} blocks, {options.steps} steps, {options.forward_ms:g} ms a forward", sep="\n")
    rows: list[list[Any]] = []
    for ranks in options.ranks:
        first_of_paper = 0.0
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(
                folder,
                ranks=ranks,
                guidance_parallel=options.guidance_parallel,
                device="cpu",
                threads=1,
                outputs=outputs,
                worker_hook="benchmarks.timed_stage:install",
            ) as engine,
        ):
            for name, changes in METHODS.items():
                request = engine.resolve(base.model_copy(update=changes))
                model = predicted(request, engine.grid, options.forward_ms / 1000)
                run = measured(Path(engine.submit(request).result().path).parent, options.steps)
                first_of_paper = first_of_paper or run.first_block
                rows.append([
                    ranks, name, request.max_in_flight, f"{model.first_block:.2f}", f"{run.first_block:.2f}",
                    f"{model.total:.2f}", f"{run.total:.2f}", f"{100 * (run.total / model.total - 1):+.1f} %",
                    f"{100 * (run.first_block / model.first_block - 1):+.1f} %", f"{100 * min(model.busy):.0f} %",
                    f"{100 * min(run.busy):.0f} %", f"{first_of_paper / run.first_block:.1f}",
                ])  # fmt: skip
    header = [
        "ranks", "method", "in flight", "first block, model s", "run s", "total, model s", "run s", "total off", "first off",
        "busy, model", "busy, run", "first block sooner than `paper`",
    ]  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
