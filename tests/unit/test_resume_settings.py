"""A job goes on only where it would have given the same bits: same model, dtype and everything else that changes numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualparal.errors import RequestError
from dualparal.events import Failed, Queued
from dualparal.request import GenerationRequest
from dualparal.runtime.engine import Engine
from dualparal.runtime.engine_options import CHANGES
from dualparal.runtime.journal import JobFolder
from tests.fake_group import NUM_BLOCKS
from tests.unit.conftest import Make

SECONDS = 20.0
WANTED = GenerationRequest(
    prompt="cut off", latents_num=4, num_per_block=2, num_cat=1, num_inference_steps=2, height=32, width=32
)


@pytest.fixture
def lora(tmp_path: Path) -> str:
    name = "diffusion_model.blocks.0.self_attn.q"
    rows = {f"{name}.lora_A.weight": torch.zeros(2, 32), f"{name}.lora_B.weight": torch.zeros(32, 2)}
    save_file(rows, tmp_path / "style.safetensors")
    return str(tmp_path / "style.safetensors")


def cut_off(engine: Engine, job_id: str = "abcdef") -> JobFolder:
    """A job of `engine` as it lies on disk after a failure, with the record that `submit` writes."""
    with engine:
        folder = engine.submit(WANTED, job_id=job_id).folder
        engine.job(job_id).result(SECONDS)  # type: ignore[union-attr]
    (folder.path / "events.jsonl").unlink()
    folder.append(Queued(job_id=job_id, position=0))
    folder.append(Failed(job_id=job_id, kind="WorkerDied", message="rank 0 was killed"))
    return folder


OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "attention": {"attention": "native"},
    "compile": {"compile": True},
    "quantization": {"quantization": "fp8"},
    "vae_dtype": {"vae_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("is_plain_first", [True, False])
def test_other_numbers_are_refused_in_one_sentence(make: Make, name: str, is_plain_first: bool) -> None:
    settings = [{}, OTHERS[name]]
    first, then = settings if is_plain_first else settings[::-1]
    folder = cut_off(make(**first))
    with make(**then) as engine:
        with pytest.raises(RequestError, match="was made with") as caught:
            engine.resume(folder.job_id)
        assert str(OTHERS[name][name]) in str(caught.value)
        assert engine.jobs() == [] and isinstance(folder.final_event(), Failed)
    with make(**first) as engine:
        assert engine.resume(folder.job_id).result(SECONDS).num_frames == 4 * NUM_BLOCKS


def test_another_lora_or_scale_is_refused(make: Make, lora: str) -> None:
    folder = cut_off(make(loras=[f"{lora}:0.5"]))
    for others in ([], [lora], [f"{lora}:0.5", f"{lora}:0.5"]):
        with make(loras=others) as engine, pytest.raises(RequestError, match=r"was made with .*style"):
            engine.resume(folder.job_id)
    with make(loras=[f"{lora}:0.5"]) as engine:
        assert engine.resume(folder.job_id).result(SECONDS)


def test_another_model_is_refused(make: Make, tiny_two: Path) -> None:
    folder = cut_off(make())
    with make(tiny_two) as engine, pytest.raises(RequestError, match="two experts"):
        engine.resume(folder.job_id)


def test_other_ranks_go_on_and_other_threads_are_written_down(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = cut_off(make(ranks=1))
    with make(ranks=2, threads=1) as engine:
        engine.resume(folder.job_id).result(SECONDS)
    assert not caplog.records
    other = cut_off(make(), "abcdee")
    with caplog.at_level(logging.WARNING), make(threads=2) as engine:
        engine.resume(other.job_id).result(SECONDS)
    assert caplog.text.count("1 threads per process; bits may differ") == 1


def test_another_kind_of_device_is_written_down(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = cut_off(make())
    record = folder.record()
    assert record["device"] == "cpu"
    (folder.path / "request.json").write_text(json.dumps({**record, "device": "cuda"}))
    with caplog.at_level(logging.WARNING), make() as engine:
        engine.resume(folder.job_id).result(SECONDS)
    assert "was begun on cuda and goes on on cpu; bits differ" in caplog.text


def test_a_restart_leaves_jobs_of_other_settings_alone(make: Make) -> None:
    folder = cut_off(make(vae_dtype="bfloat16"))
    (folder.path / "events.jsonl").unlink()
    folder.append(Queued(job_id=folder.job_id, position=0))
    assert make().recover() == []
    assert folder.final_event() is None
    assert [job.id for job in make(vae_dtype="bfloat16").recover()] == [folder.job_id]


def test_every_change_is_tried_here() -> None:
    assert set(CHANGES) == (set(OTHERS) | {"loras"}) - {"dtype"}
