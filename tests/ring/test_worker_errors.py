"""What a worker says when something ends it: the class and one sentence, fit for a page."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualparal.errors import DualParalError, RequestError, error_from_wire
from dualparal.messages import CancelJob, Denoised, JobError, RunJob, Shutdown
from dualparal.method.grid import Grid
from dualparal.options import EngineOptions
from dualparal.ring.coordinator import Coordinator
from dualparal.ring.worker import describe_error
from tests.settings import settings


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (MemoryError(), "OutOfMemory", "rank 1 ran out of memory; use more ranks"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory", "rank 1 ran out of memory"),
        (RuntimeError("first line\nsecond line"), "WorkerFailed", "rank 1 failed: RuntimeError: first line"),
        (KeyError(), "WorkerFailed", "rank 1 failed: KeyError: KeyError"),
        (ValueError("x" * 5000), "WorkerFailed", "rank 1 failed: ValueError: xxx"),
        (DualParalError("as it is"), "DualParalError", "as it is"),
    ],
)
def test_one_sentence(error: BaseException, kind: str, says: str) -> None:
    found, message = describe_error("rank 1", error)
    assert found == kind
    assert message.startswith(says)
    assert "\n" not in message and len(message) < 500
    assert type(error_from_wire(found, message)).__name__ == kind


def test_an_unknown_class_from_a_worker_is_still_an_error_of_ours() -> None:
    for name in ("KeyError", "os", "annotations", "error_from_wire", ""):
        assert type(error_from_wire(name, "what happened")).__name__ == "WorkerFailed"


def test_rank_0_forgets_stops_that_come_too_late(tmp_path: Path) -> None:
    """The front end sends one for every job that fails; the job may be run again, and a server runs for months."""
    job = RunJob("abcdef", settings(), str(tmp_path))
    late = CancelJob("abcdef")
    after_each_run: list[list[Any]] = [[late, job], [late, job], [late, Shutdown()]]
    requests: queue.Queue[Any] = queue.Queue()
    reported: list[type] = []
    stopped: list[bool] = []

    def send(message: Any) -> None:
        reported.append(type(message))
        if isinstance(message, Denoised):
            for one in after_each_run.pop(0):
                requests.put(one)

    to_codec = SimpleNamespace(put=lambda _: None, close=lambda: None, join_thread=lambda: None)
    parts: list[Any] = [None, SimpleNamespace(grid=Grid(1)), SimpleNamespace(config=lambda _: {}), SimpleNamespace(send=send)]
    rank_0 = Coordinator(*parts, requests, to_codec, queue.Queue(), SimpleNamespace(engine=EngineOptions(timeout_s=1.0)))  # type: ignore[arg-type]

    def run(job: RunJob) -> None:
        if len(stopped) == 2:
            requests.put(CancelJob(job.job_id))  # in mid-run
        stopped.append(rank_0._is_stopped(job.job_id))
        raise RequestError("latents do not fit")

    rank_0._run = run  # type: ignore[method-assign]
    for message in (CancelJob("123456"), job):
        requests.put(message)
    rank_0.serve()
    assert reported == [JobError, Denoised] * 3
    assert stopped == [False, False, True]
    assert rank_0._cancelled == set()
