"""What a job's folder grows to, and what was kept free for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from dualparal import Engine, GenerationRequest
from dualparal.jobs.storage import folder_bytes
from dualparal.planning.disk import bytes_needed

WAIT_S = 300
TIMES = 4.0  # what is kept free may be so many times what was there at most


@pytest.mark.distributed
@pytest.mark.parametrize(
    "values",
    [
        {"seconds": 2.0},
        {"seconds": 4.0, "num_per_block": 4, "num_cat": 4, "schedule": "preview", "context": "recomputed"},
    ],
)
def test_what_is_kept_free_is_near_what_is_used(values: dict[str, Any], tmp_path: Path) -> None:
    most, has_ended = 0, threading.Event()
    hook = "tests.distributed.hooks:saves_often"
    with Engine("pocket", device="cpu", threads=1, outputs=tmp_path, worker_hook=hook) as engine:
        job = engine.submit(GenerationRequest(prompt="a red circle bouncing on a navy background", seed=1, **values))

        def watch() -> None:
            nonlocal most
            while not has_ended.wait(0.003):
                most = max(most, folder_bytes(job.folder.path))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            job.result(WAIT_S)
        finally:
            has_ended.set()
            watching.join()
    needed = bytes_needed(job.request)
    assert most <= needed <= TIMES * most, f"{most:,} bytes at most, {needed:,} kept free"
