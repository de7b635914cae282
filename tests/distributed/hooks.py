"""What tests put into workers (`worker_hook="tests.distributed.hooks:faults"`): faults, by a job's number of steps."""

from __future__ import annotations

import time
from typing import Any

FAILS_ON_RANK_1 = 13  # inference steps of the jobs that go wrong
IS_SLOW = 19
SLEEP_S = 0.03


def faults(*, rank: int | None, **parts: Any) -> None:
    """Jobs of 13 steps fail on rank 1, of 19 take their time."""
    if rank is None:
        return
    stage = parts["stage"]
    begin, run = stage.begin, stage.run
    steps = [0]

    def begin_noting(shape: Any, schedule: Any, conditions: Any) -> Any:
        steps[0] = schedule.num_steps
        return begin(shape, schedule, conditions)

    def run_with_faults(item: Any, incoming: Any) -> Any:
        if steps[0] == FAILS_ON_RANK_1 and rank == 1 and item.step == 6:
            raise RuntimeError("the roof is on fire\nand this is the second line")
        if steps[0] == IS_SLOW:
            time.sleep(SLEEP_S)
        return run(item, incoming)

    stage.begin, stage.run = begin_noting, run_with_faults


def hangs(*, rank: int | None, **parts: Any) -> None:
    """The codec never comes back from pictures 48 pixels wide."""
    if rank is not None:
        return
    decoder = parts["decoder"]
    decode = decoder.decode

    def decode_or_hang(latents: Any) -> Any:
        if latents.shape[-1] == 6:
            decoder.on_frame()
            time.sleep(10_000)
        return decode(latents)

    decoder.decode = decode_or_hang
