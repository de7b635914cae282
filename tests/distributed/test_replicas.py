"""Two real replicas: they work at the same time, and the death of one is nothing to the other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from dualparal import Engine, Finished, GenerationRequest, Interrupted, WorkerDied
from dualparal.engine.replica import Replica
from dualparal.jobs.job import Job
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW

WAIT_S = 600
SMALL = Preset(height=32, width=32, num_per_block=3, num_cat=2)
SLOW = GenerationRequest(prompt="at the same time", latents_num=30, num_inference_steps=IS_SLOW, seed=3)
pytestmark = pytest.mark.timeout(1800)


def replica_of(engine: Engine, job: Job) -> Replica:
    return next(replica for replica in engine.replicas if replica.holds(job.id))


def latents(job: Job) -> torch.Tensor:
    found = job.result(WAIT_S).latents
    assert found is not None
    return found


@pytest.mark.parametrize("auto_resume", [False, True])
def test_a_replica_that_dies_is_nothing_to_the_other(
    auto_resume: bool, tiny: Path, tmp_path: Path, leaves_nothing: None
) -> None:
    with Engine(
        tiny, preset=SMALL, replicas=2, ranks=1, device="cpu", threads=1, outputs=tmp_path, auto_resume=auto_resume,
        worker_hook="tests.distributed.hooks:faults",
    ) as engine:  # fmt: skip
        assert wait_until(lambda: all(replica.state == "ready" for replica in engine.replicas), WAIT_S)
        jobs = [engine.submit(SLOW, return_latents=True) for _ in range(2)]
        assert wait_until(lambda: all(job.view().progress is not None for job in jobs), WAIT_S), "they do not work side by side"
        assert not any(job.has_ended for job in jobs)
        victim, spared = (replica_of(engine, job) for job in jobs)
        assert victim is not spared
        pids = {name: about["pid"] for name, about in engine.workers.items()}
        assert len(set(pids.values())) == 4, "two ranks and two codecs"
        os.kill(int(victim.workers["rank 0"]["pid"]), signal.SIGKILL)
        expected = latents(jobs[1])
        assert spared.num_restarts == 0
        if auto_resume:
            assert torch.equal(latents(jobs[0]), expected)
            kinds = [type(event) for event in jobs[0].events()]
            assert Interrupted in kinds and kinds[-1] is Finished
        else:
            with pytest.raises(WorkerDied, match="rank 0 was killed by SIGKILL"):
                jobs[0].result(WAIT_S)
        assert wait_until(lambda: all(replica.state == "ready" for replica in engine.replicas), WAIT_S)
        assert victim.num_restarts == 1
        calm = [engine.submit(SLOW, return_latents=True) for _ in range(2)]
        assert wait_until(lambda: all(replica.at_rank_0 in calm for replica in engine.replicas), WAIT_S)
        assert all(torch.equal(latents(job), expected) for job in calm)
