"""How long a new prompt takes to be seen, for each schedule: a film of the pocket model's settings is steered at some share of
its run. From the event model, so that it can be told for any number of ranks and for any speed.

Blocks: those in flight then, all of which come before the new prompt. Film: seconds from the end of what is finished then to
the first frame that shows it. Waited: until that frame's block is denoised, as a share of the run, and in seconds for a model
that needs `--block_step_s` for one step of one block over all its layers.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import table
from dualparal.method.event_model import even_cost, forecast
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import make_schedule
from dualparal.presets import complete, find_preset, load_presets
from dualparal.request import GenerationRequest

SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "paper", "context": "cached"},
    "preview, 5 in flight": {"schedule": "preview", "context": "cached", "max_in_flight": 5},
    "preview, 2 in flight": {"schedule": "preview", "context": "cached", "max_in_flight": 2},
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--at", type=float, nargs="+", default=[0.1, 0.4])
    parser.add_argument("--block_step_s", type=float, default=1.0)
    asked = parser.parse_args()
    rows = []
    for name, chosen in SCHEDULES.items():
        request = GenerationRequest(prompt="any", seconds=asked.seconds, seed=0, **chosen)
        settings = complete(request, find_preset("pocket", load_presets()), ranks=asked.ranks)
        plan = plan_of(settings)
        schedule = make_schedule(rules_of(settings), plan, (0,) * settings.num_inference_steps)
        run = forecast(schedule, asked.ranks, even_cost(schedule, asked.ranks))
        for share in asked.at:
            now = share * run.total
            finished = sum(done <= now for done in run.block_done)
            begun = 1 + max(block for (block, step), done in run.step_done.items() if step == 1 and done <= now)
            if begun == plan.num_blocks:
                rows.append([name, f"{share:.0%}", begun - finished, "all have entered: refused", "", ""])
                continue
            film_s = (plan.frames(begun).start - plan.frames(finished).start) / settings.fps
            wait = run.block_done[begun] - now
            rows.append(
                [
                    name, f"{share:.0%}", begun - finished, f"{film_s:.1f} s", f"{wait / run.total:.0%}",
                    f"{wait * asked.block_step_s:.0f} of {run.total * asked.block_step_s:.0f} s",
                ]
            )  # fmt: skip
    print(table(["schedule", "steered at", "blocks before it", "film before it", "waited", "waited, seconds"], rows))


if __name__ == "__main__":
    main()
