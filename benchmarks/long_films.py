"""What grows with an endless film: the schedule of each rank, the noise that a resumed job passes over, the page's strip.

    python -m benchmarks.long_films [--blocks 1000] [--steps 20]

Processor seconds and bytes for a film that has been planned to so many blocks; `preview`, five in flight, cached context.
"plans" is how often it was planned on the way. The noise is that of 832 x 480.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks.common import hardware, table
from dualparal.method.endless import extended
from dualparal.method.noise import CoordinatedNoise
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import make_schedule
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest
from dualparal.ui import charts, looks


def seconds_of(call: Callable[[], Any]) -> float:
    began_s = time.process_time()
    call()
    return time.process_time() - began_s


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    request = GenerationRequest(
        prompt="a", seed=1, is_endless=True, schedule="preview", context="cached", max_in_flight=5, stagger=options.steps // 5,
        num_inference_steps=options.steps,
    )  # fmt: skip
    settings = complete(request, Preset(num_per_block=8, num_cat=8))
    num_plans = 1
    while plan_of(settings).num_blocks < options.blocks:
        settings, num_plans = extended(settings, plan_of(settings)), num_plans + 1
    plan, experts = plan_of(settings), (0,) * options.steps
    made_s = seconds_of(lambda: make_schedule(rules_of(settings), plan, experts))
    tracemalloc.start()
    schedule = make_schedule(rules_of(settings), plan, experts)
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    noise = CoordinatedNoise(plan, 8, 1, channels=16, height=60, width=104)
    passed_s = seconds_of(lambda: [noise.skip() for _ in range(options.blocks)])
    found: Any = SimpleNamespace(
        request=settings, blocks=[SimpleNamespace(block=block) for block in range(options.blocks)], progress=None,
        is_ended=False, is_baseline=False, state="running", looks={}, folder=None,
    )  # fmt: skip
    looks.cells = lambda found, root: {}
    page = charts.strip(found)
    print(hardware())
    print(table(
        ("blocks", "plans", "items", "schedule, s", "schedule, MB", "noise passed over, s", "strip, kB"),
        [(plan.num_blocks, num_plans, len(schedule.items), f"{made_s:.2f}", f"{num_bytes / 1e6:.1f}", f"{passed_s:.3f}",
          f"{len(page) / 1e3:.1f}")],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
