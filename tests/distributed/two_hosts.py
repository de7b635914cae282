"""What torchrun runs in test_hosts.py: every process the same program, as with `dualparal serve`.

    torchrun ... -m tests.distributed.two_hosts CHECKPOINT FOLDER

Rank 0 makes a job, is cut off from the others in the middle of the next, and makes the first job again once they are back.
It tells what happens in files: `first.npy`, `workers.json`, `running`, `error.txt`, `again.npy`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dualparal import DualParalError, Engine, GenerationRequest, Progress
from dualparal.hosts.torchrun import find_team
from dualparal.logs import set_up_logs
from dualparal.presets import Preset
from tests.distributed.hooks import IS_SLOW

SMALL = Preset(
    height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", schedule="paper"
)
REQUEST = GenerationRequest(prompt="a red circle bounces", latents_num=12, seed=7)
SLOW = GenerationRequest(prompt="slow", latents_num=600, num_inference_steps=IS_SLOW, seed=1)
WAIT_S = 600


def put(path: Path, data: bytes) -> None:
    """Write `path` at once: who sees it sees all of it."""
    partial = path.with_suffix(".part")
    partial.write_bytes(data)
    partial.rename(path)


def make(engine: Engine, target: Path) -> None:
    latents = engine.submit(REQUEST, return_latents=True).result(WAIT_S).latents
    assert latents is not None
    put(target, np.asarray(latents).tobytes())


def main(checkpoint: str, folder: Path) -> int:
    set_up_logs(verbose=True, worker=team.name if (team := find_team()) else "front end")
    engine = Engine(
        checkpoint, preset=SMALL, device="cpu", threads=1, outputs=folder / "outputs", team=team,
        worker_hook="tests.distributed.hooks:faults", verbose=True,
    )  # fmt: skip
    if engine.team and not engine.team.is_front_end:
        return engine.host()
    with engine:
        make(engine, folder / "first.npy")
        put(folder / "workers.json", json.dumps(engine.workers).encode())
        slow = engine.submit(SLOW)
        for event in slow.events(WAIT_S):
            if isinstance(event, Progress):
                put(folder / "running", b"")
                break
        try:
            slow.result(WAIT_S)
        except DualParalError as error:
            put(folder / "error.txt", f"{type(error).__name__}: {error}".encode())
        make(engine, folder / "again.npy")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
