"""Guidance halves on rings of their own, by the real engine: the bits of one ring, whatever happens to the job."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest, RequestError, WorkerDied
from dualparal.jobs.timeline import read_timeline
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_resume import saved_item
from tests.distributed.test_steering import WAIT_S, check_same, open_engine

pytestmark = pytest.mark.distributed

FILM = GenerationRequest(
    prompt="a cat\n[3s] sits\n[3s cut] runs\n[3s] sleeps", schedule="preview", context="cached", refresh=3, max_in_flight=3,
    num_inference_steps=IS_SLOW, seed=3,
)  # fmt: skip
ENDLESS = GenerationRequest(
    prompt="a cat sits", is_endless=True, seed=7, schedule="preview", context="cached", refresh=3, max_in_flight=3,
    guidance_start=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(tiny, tmp_path_factory.mktemp("outputs")) as engine:
        yield engine


def test_steered_endless_and_wrapped_up(tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with open_engine(tiny, tmp_path, ranks=4, guidance_parallel=2) as engine:
        job = engine.submit(ENDLESS, return_latents=True)
        assert job.request.micro_batches, "settled before it is stored"
        assert wait_until(lambda: len(job.view().blocks) > 2, WAIT_S)
        job.steer("a dog runs", "blend")
        job.finish()
        result = job.result(WAIT_S)
        names = engine.grid.names
    assert names == ("stage 0", "stage 1", "stage 0 beside", "stage 1 beside")
    assert {span.stage for span in read_timeline(job.folder.path)} >= set(names)
    check_same(plain, job.request, result)


def test_killed_on_two_rings_a_job_goes_on_on_one(tiny: Path, tmp_path: Path, plain: Engine) -> None:
    hook = "tests.distributed.hooks:faults"
    with open_engine(tiny, tmp_path, ranks=2, guidance_parallel=2, worker_hook=hook) as engine:
        job = engine.submit(FILM)
        assert wait_until(lambda: saved_item(job.folder) > 30, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
        batched = job.request.model_copy(update={"micro_batches": False})
        with pytest.raises(RequestError, match="micro_batches is off, and guidance_parallel=2"):
            engine.submit(batched)
    assert job.folder.record()["guidance_parallel"] == 2
    with open_engine(tiny, tmp_path, ranks=2) as engine:
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
    check_same(plain, job.request, resumed)
