"""A job goes on only where it would have given the same bits: same model, dtype and everything else that changes numbers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualparal.engine.engine import Engine
from dualparal.errors import RequestError
from dualparal.events import Failed, Queued
from dualparal.jobs.folder import JobFolder
from dualparal.options import CHANGES, EngineOptions, beside, choices_of
from dualparal.request import GenerationRequest
from tests.fake_group import FOUR_BLOCKS, NUM_FRAMES, Make

SECONDS = 20.0
WANTED = GenerationRequest(prompt="cut off", **FOUR_BLOCKS)


@pytest.fixture
def lora(tmp_path: Path) -> str:
    name = "diffusion_model.blocks.0.self_attn.q"
    rows = {f"{name}.lora_A.weight": torch.zeros(2, 24), f"{name}.lora_B.weight": torch.zeros(24, 2)}
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


TEXTS = {"dtype": "bfloat16", "attention": "native", "vae_dtype": "bfloat16"}


def another(name: str) -> Any:
    """A value of an option that makes other numbers than the plain one."""
    kind, plain = EngineOptions.model_fields[name].annotation, beside(name).get("plain")
    choices = (True, False) if kind is bool else choices_of(kind)
    if not choices and isinstance(plain, int | float):
        return plain + 1
    return next(value for value in choices if value != plain) if choices else TEXTS[name]


OTHERS = {name: {name: another(name)} for name in ("dtype", *CHANGES) if name != "loras"}


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
        assert engine.resume(folder.job_id).result(SECONDS).num_frames == NUM_FRAMES


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
    assert not [record for record in caplog.records if folder.job_id in record.getMessage()], "what others log is theirs"
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


@pytest.mark.parametrize("what", ["vae", "transformer", "text_encoder", "lora"])
def test_files_that_were_overwritten_in_place(
    make: Make, tiny: Path, tmp_path: Path, lora: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Same names, other weights: the job says so and asks."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    folder = cut_off(make(model, loras=[lora]))
    file = Path(lora) if what == "lora" else next((model / what).glob("*.safetensors"))
    shutil.copy2(file, tmp_path / "kept")
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    engine = make(model, loras=[lora])
    with engine, pytest.raises(RequestError, match=rf"other weights: .*{'LoRA' if what == 'lora' else what}.*--anyway"):
        engine.resume(folder.job_id)
    again = make(model, loras=[lora])
    with again, caplog.at_level(logging.WARNING):
        again.resume(folder.job_id, anyway=True)
        assert "goes on with other weights" in caplog.text
