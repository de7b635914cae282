"""A real worker is killed in mid-job; the job goes on from its saved sweep, on another number of ranks, with the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal import Engine, GenerationRequest, Progress, WorkerDied
from dualparal.files import STATE_FOLDER
from dualparal.jobs.folder import JobFolder
from dualparal.presets import Preset
from dualparal.ring.saved_sweeps import read_state
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW

WAIT_S = 300
SMALL = Preset(height=32, width=32, num_per_block=3, num_cat=2)


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, preset=SMALL, device="cpu", threads=1, outputs=outputs, **options)


def saved_item(job: JobFolder) -> int:
    """The item that a resumed job would begin with."""
    state, _ = read_state(job.path / STATE_FOLDER)
    return state.next_index if state else 0


@pytest.mark.distributed
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_a_job_goes_on_from_its_saved_sweep_on_other_ranks(context: str, tiny: Path, tmp_path: Path) -> None:
    request = GenerationRequest(
        prompt="goes on",
        latents_num=30,
        num_inference_steps=IS_SLOW,
        seed=3,
        context=context,  # type: ignore[arg-type]
        refresh=4,
    )
    with open_engine(tiny, tmp_path / "killed", ranks=2, worker_hook="tests.distributed.hooks:faults") as engine:
        job = engine.submit(request)
        assert wait_until(lambda: saved_item(job.folder) > 30, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    border = saved_item(job.folder)
    with open_engine(tiny, tmp_path / "killed", ranks=3) as engine:
        again = engine.resume(job.id, return_latents=True)
        seen = [event.items_done for event in again.events(WAIT_S) if isinstance(event, Progress)]
        resumed = again.result(WAIT_S)
        calm = engine.submit(job.request, return_latents=True)
        whole = calm.result(WAIT_S)
    assert seen and min(seen) >= border // 2, "it began anew"
    assert resumed.latents is not None and whole.latents is not None
    assert torch.equal(resumed.latents, whole.latents)
    reported, expected = JobFolder(job.folder.path), JobFolder(calm.folder.path)
    assert [path.read_bytes() for path in reported.segments()] == [path.read_bytes() for path in expected.segments()]
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()
    assert not (job.folder.path / STATE_FOLDER).exists()
