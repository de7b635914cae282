"""Takes with real workers: each rests saved at its first look, and goes on to the bits of one that never rested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualparal import GenerationRequest
from dualparal.errors import JobCancelled
from dualparal.events import Cancelled
from tests.distributed.test_resume import WAIT_S, open_engine, saved_item


@pytest.mark.distributed
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_a_take_rests_and_goes_on_to_the_same_bits(context: str, tiny: Path, tmp_path: Path) -> None:
    request = GenerationRequest(
        prompt="one of two",
        latents_num=14,
        num_inference_steps=10,
        seed=3,
        context=context,
        refresh=3,  # type: ignore[arg-type]
    )
    with open_engine(tiny, tmp_path, ranks=2) as engine:
        takes = engine.submit_takes(request, 2)
        for take in takes:
            with pytest.raises(JobCancelled):
                take.result(WAIT_S)
            assert isinstance(take.view().final, Cancelled) and take.view().final.is_resting
            assert 0 < saved_item(take.folder) < 70, "nothing was saved where it rests"
        assert [take.request.seed for take in takes] == [3, 4]
        again = engine.resume(takes[1].id, return_latents=True)
        chosen = again.result(WAIT_S)
        calm = engine.submit(takes[1].request, return_latents=True).result(WAIT_S)
    assert chosen.latents is not None and calm.latents is not None
    assert torch.equal(chosen.latents, calm.latents)
    assert takes[0].view().final is not None and saved_item(takes[0].folder) > 0, "the other one still rests"
