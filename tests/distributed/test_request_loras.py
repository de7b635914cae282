"""LoRAs of single videos in real workers: switched between jobs on every rank, gone with the job, the same bits everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualparal.errors import RequestError
from dualparal.request import GenerationRequest
from tests.distributed.test_engine import REQUEST, latents_of, open_engine
from tests.model.test_lora import as_diffusers, as_original, write


def test_jobs_with_and_without_in_turn(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    write(tmp_path, as_original(), "a.safetensors")
    write(tmp_path, as_diffusers(seed=4), "b.safetensors")
    asked = REQUEST.model_dump(exclude_none=True)
    names = ([], ["a.safetensors"], [], ["a.safetensors", "b.safetensors:0.5"], ["a.safetensors"])
    found: dict[int, list[torch.Tensor]] = {}
    for ranks in (1, 3):
        with open_engine(tiny, tmp_path / "outputs", ranks=ranks, lora_folder=tmp_path, lora_cache_bytes=0) as engine:
            found[ranks] = [latents_of(engine, GenerationRequest(**asked | {"loras": loras})) for loras in names]
            with pytest.raises(RequestError, match="there is no LoRA"):
                engine.submit(GenerationRequest(**asked | {"loras": ["c.safetensors"]}))
    plain, one, again, both, back = found[1]
    assert torch.equal(plain, again) and torch.equal(one, back)
    assert (one - plain).abs().max() > 0.01 and (both - one).abs().max() > 1e-3
    assert all(torch.equal(*pair) for pair in zip(found[1], found[3], strict=True))


def test_a_broken_file_ends_its_job_only(tiny: Path, tmp_path: Path) -> None:
    state = as_diffusers()
    state["transformer.blocks.0.attn1.to_q.lora_A.weight"][0, 0] = float("nan")
    write(tmp_path, state, "nan.safetensors")
    asked = REQUEST.model_dump(exclude_none=True)
    with open_engine(tiny, tmp_path / "outputs", lora_folder=tmp_path) as engine:
        plain = latents_of(engine)
        job = engine.submit(GenerationRequest(**asked | {"loras": ["nan.safetensors"]}))
        with pytest.raises(Exception, match="holds NaN or infinite numbers"):
            job.result(300)
        assert torch.equal(latents_of(engine), plain)
