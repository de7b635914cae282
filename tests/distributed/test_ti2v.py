"""Wan2.2-TI2V-5B's layout with everything else that a film may have: shots, LoRAs, skipped steps, kills, continuations, films
without an end, early looks. One of each; the method's own cases are those of the other layouts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualparal import Engine, GenerationRequest, Look, WorkerDied
from dualparal.jobs.job import Job
from dualparal.media.metadata import describe
from dualparal.media.rough import unpack
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.timeline import scenes_of
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_resume import saved_item
from tests.model.test_lora import as_diffusers, write
from tests.texts import as_said
from tests.twin import Twin, texts_by_block

WAIT_S = 300
SMALL = Preset(height=64, width=96, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", fps=8)
SHOTS = "a cat\n[2s] sits\n[2.5s blend] runs\n[2s cut] sleeps on a red chair\n[1s] sits"
RULES: dict[str, dict[str, Any]] = {
    "recomputed": {
        "schedule": "paper",
        "context": "recomputed",
        "num_inference_steps": 8,
        "cache_interval": 2,
        "cache_order": 0,
    },
    "cached": {"schedule": "preview", "context": "cached", "refresh": 3, "max_in_flight": 3},
}


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a rose.png"
    Image.effect_noise((96, 64), 90).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loras"), as_diffusers(), "a.safetensors").parent


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def engine(tiny_ti2v: Path, outputs: Path, loras: Path) -> Iterator[Engine]:
    with open_engine(tiny_ti2v, outputs, lora_folder=loras) as engine:
        yield engine


def encoded(folder: Path, *texts: str) -> list[torch.Tensor]:
    encoder = TextEncoder(Checkpoint(folder), device="cpu", dtype=torch.float32)
    return [encoder.encode(text) for text in texts]


@pytest.mark.parametrize("rules", RULES)
def test_shots_are_the_twins(rules: str, engine: Engine, tiny_ti2v: Path) -> None:
    job = engine.submit(GenerationRequest(prompt=SHOTS, seed=7, **RULES[rules]), return_latents=True)
    found, settings = job.result(WAIT_S), job.request
    plan = plan_of(settings)
    negative, *texts = encoded(tiny_ti2v, SMALL.negative_prompt, *(f"a cat {shot.prompt}" for shot in settings.shots or ()))
    shots = [(shot.latents_num, text, shot.transition) for shot, text in zip(settings.shots or (), texts, strict=True)]
    blocks = Twin(tiny_ti2v).run(
        latents_num=settings.latents_num, num_per_block=3, num_cat=2, steps=settings.num_inference_steps, seed=7, size=(4, 6),
        texts=[[text, negative] for text in texts_by_block(shots, plan.lengths)], text_of_block=range(plan.num_blocks),
        scenes=scenes_of(settings.shots or ()), **as_said(rules_of(settings)),
    )  # fmt: skip
    assert plan.cuts and plan.num_blocks == 5
    assert found.latents is not None
    assert (found.latents - torch.cat([blocks[number] for number in range(plan.num_blocks)], dim=2)).abs().max() <= 1e-5
    assert describe(found.path)["num_frames"] == found.num_frames == settings.num_frames


@pytest.mark.parametrize("rules", RULES)
def test_all_at_once_on_any_ranks(
    rules: str, engine: Engine, tiny_ti2v: Path, tmp_path: Path, picture: Path, loras: Path, leaves_nothing: None
) -> None:
    """A picture, shots, a LoRA; the schedule that was settled on one rank."""
    asked = GenerationRequest(prompt=SHOTS, seed=7, start_image=str(picture), loras=["a.safetensors"], **RULES[rules])
    job = engine.submit(asked, return_latents=True)
    expected = job.result(WAIT_S)
    assert expected.latents is not None
    plain = engine.submit(asked.model_copy(update={"loras": ()}), return_latents=True).result(WAIT_S)
    assert plain.latents is not None and (plain.latents - expected.latents).abs().max() > 0.01
    assert torch.equal(plain.latents[:, :, :1], expected.latents[:, :, :1]), "the picture's own, whatever the weights"
    for ranks in (2, 4):
        with open_engine(tiny_ti2v, tmp_path / str(ranks), ranks=ranks, lora_folder=loras) as other:
            settings = job.request.model_copy(update={"start_image": str(picture)})
            found = other.submit(settings, return_latents=True).result(WAIT_S)
        assert found.latents is not None and torch.equal(found.latents, expected.latents)
        assert Path(found.path).read_bytes() == Path(expected.path).read_bytes()


@pytest.mark.parametrize("rules", RULES)
def test_killed_and_resumed(rules: str, tiny_ti2v: Path, tmp_path: Path, picture: Path) -> None:
    asked = GenerationRequest(
        **RULES[rules] | {"num_inference_steps": IS_SLOW}, prompt="a cat", latents_num=16, seed=7, start_image=str(picture)
    )
    with open_engine(tiny_ti2v, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(asked)
        assert wait_until(lambda: saved_item(job.folder) > 20, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny_ti2v, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
        settings = job.request.model_copy(update={"start_image": str(picture)})
        whole = engine.submit(settings, return_latents=True).result(WAIT_S)
    assert resumed.latents is not None and whole.latents is not None and torch.equal(resumed.latents, whole.latents)
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()


def pictures(job: Job) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((job.folder.path / "frames").glob("*.png"))])


def test_a_film_that_goes_on(engine: Engine, tiny_ti2v: Path, outputs: Path, picture: Path) -> None:
    """From the last latents of one that began with a picture: as noisy as the block beside them, and decoded as one."""
    first = engine.submit(
        GenerationRequest(prompt="a cat", latents_num=7, seed=3, start_image=str(picture)), return_latents=True,
        export_images=True,
    )  # fmt: skip
    before = first.result(WAIT_S).latents
    asked = GenerationRequest(prompt="a dog", latents_num=8, seed=7, continue_from=first.id, join=True, **RULES["cached"])
    job = engine.submit(asked, return_latents=True, export_images=True)
    found = job.result(WAIT_S)
    assert before is not None and found.latents is not None
    blocks = Twin(tiny_ti2v).run(
        latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=[encoded(tiny_ti2v, "a dog", SMALL.negative_prompt)], seed=7,
        size=(4, 6), ghost=before[:, :, -2:], **as_said(rules_of(job.request)),
    )  # fmt: skip
    assert (found.latents - torch.cat([blocks[number] for number in sorted(blocks)], dim=2)).abs().max() <= 1e-5
    decoder = StreamingDecoder.load(Checkpoint(tiny_ti2v), device="cpu")
    expected = to_uint8(decoder.decode(torch.cat([before, found.latents], dim=2))).numpy()
    seen = np.concatenate([pictures(first), pictures(job)])
    assert len(seen) == 25 + 32 and np.abs(seen.astype(int) - expected.astype(int)).max() <= 1
    assert describe(found.path)["num_frames"] == 25 + 32
    with open_engine(tiny_ti2v, outputs, ranks=2) as other:
        again = other.submit(job.request, return_latents=True).result(WAIT_S)
    assert again.latents is not None and torch.equal(again.latents, found.latents)
    assert Path(again.path).read_bytes() == Path(found.path).read_bytes()


def test_without_an_end_steered_and_looked_at(engine: Engine, tiny_ti2v: Path, tmp_path: Path) -> None:
    asked = GenerationRequest(prompt="a cat sits", is_endless=True, seed=7, num_inference_steps=IS_SLOW, **RULES["cached"])
    with open_engine(tiny_ti2v, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:faults") as other:
        job = other.submit(asked, return_latents=True)
        assert wait_until(lambda: len(job.view().blocks) > 1 and job.view().looks, WAIT_S)
        looks: dict[int, Look] = dict(job.view().looks)
        steered = job.steer("a dog runs", "blend")
        assert wait_until(lambda: len(job.view().blocks) > steered.block, WAIT_S)
        job.finish()
        result = job.result(WAIT_S)
    for look in looks.values():
        assert len(unpack(look.picture)) == look.num_pictures
    assert job.request.shots is not None and job.request.shots[-1].prompt == "a dog runs"
    whole = engine.submit(job.request, return_latents=True).result(WAIT_S)
    assert result.latents is not None and whole.latents is not None and torch.equal(result.latents, whole.latents)
    assert Path(result.path).read_bytes() == Path(whole.path).read_bytes()
    assert describe(result.path)["num_frames"] == result.num_frames == job.request.num_frames
