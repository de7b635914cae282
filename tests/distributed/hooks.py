"""What tests put into workers (`worker_hook="tests.distributed.hooks:faults"`): faults and waits, by a job's steps."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

FAILS_ON_RANK_1 = 13  # inference steps of the jobs that go wrong
IS_SLOW = 19
SLEEP_S = 0.03
HOLD_FOLDER = "DUALPARAL_TEST_HOLD"  # names the folder of `holds`
IS_HELD = 23
HELD_ITEM = 40
UNUSED = ("peft", "sympy", "torch._dynamo", "torch._inductor", "torchvision", "transformers")
ENCODER_IS_HELD = "hold the encoder"  # a prompt


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


def saves_often(*, rank: int | None, **parts: Any) -> None:
    """Each sweep is saved, and lasts long enough to be found there."""
    if rank is None:
        return
    from dualparal.ring import saved_sweeps

    saved_sweeps.MIN_INTERVAL_S = 0.0
    saved_sweeps.StateWriter.__init__.__kwdefaults__["max_share"] = 0.99
    stage = parts["stage"]
    run = stage.run

    def run_slowly(item: Any, incoming: Any) -> Any:
        time.sleep(0.1)
        return run(item, incoming)

    stage.run = run_slowly


def holds(*, rank: int | None, **parts: Any) -> dict[str, Any] | None:
    """Work that waits for a stop. Jobs of 23 steps: the last rank stays in its block step 40 until the stop has reached rank 0,
    and files tell how many block steps each rank has begun. The prompt above is encoded once the file `go` is there."""
    folder = Path(os.environ[HOLD_FOLDER])
    if rank is None:
        encode = parts["text"].encode

        def encode_late(text: str) -> Any:
            if text == ENCODER_IS_HELD:
                (folder / "encoding").touch()
                wait_for_file(folder / "go")
            return encode(text)

        parts["text"].encode = encode_late
        return None
    stage, links = parts["stage"], parts["links"]
    requests = WatchedRequests(parts["requests"], folder / "stop has come")
    begin, run = stage.begin, stage.run
    steps = [0]

    def begin_noting(shape: Any, schedule: Any, conditions: Any) -> Any:
        steps[0] = schedule.num_steps
        if rank == 0 and steps[0] == IS_HELD:
            threading.Thread(target=requests.watch, daemon=True).start()
        return begin(shape, schedule, conditions)

    def run_held(item: Any, incoming: Any) -> Any:
        if steps[0] == IS_HELD:
            with (folder / f"begun on rank {rank}").open("ab") as begun:
                begun.write(b".")
            if rank == links.grid.ranks - 1 and item.index == HELD_ITEM:
                (folder / "held").touch()
                wait_for_file(folder / "stop has come")
        return run(item, incoming)

    stage.begin, stage.run = begin_noting, run_held
    return {"requests": requests}


class WatchedRequests:
    """Rank 0's queue; once watched, a file tells that something is in it, before anybody has taken that out."""

    def __init__(self, requests: Any, reported: Path) -> None:
        self._requests, self._reported = requests, reported
        self._is_watched = False

    def watch(self) -> None:
        self._is_watched = True
        while self.empty():
            time.sleep(0.005)

    def empty(self) -> bool:
        is_empty = bool(self._requests.empty())
        if self._is_watched and not is_empty:
            self._reported.touch()
        return is_empty

    def get(self) -> Any:
        return self._requests.get()


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


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


def tells_imports(*, rank: int | None, **parts: Any) -> None:
    """A line in a file per worker: which of UNUSED are there at its first block step, or at its first decoded block."""
    folder = Path(os.environ[HOLD_FOLDER])
    owner, name = (parts["decoder"], "decode") if rank is None else (parts["stage"], "run")
    work = getattr(owner, name)

    def work_telling(*arguments: Any) -> Any:
        with (folder / f"imports of {'codec' if rank is None else rank}").open("a") as lines:
            lines.write(f"{sorted({*UNUSED} & {*sys.modules})}\n")
        return work(*arguments)

    setattr(owner, name, work_telling)
