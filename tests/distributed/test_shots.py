"""A film of shots by the real engine: the twin's numbers, the same bits on any ranks and after a kill, frames per scene."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualparal import Engine, GenerationRequest, RequestError, Started, WorkerDied
from dualparal.jobs.folder import JobFolder
from dualparal.media.metadata import read_settings
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.timeline import scenes_of, written
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_engine import count_frames
from tests.distributed.test_resume import saved_item
from tests.texts import as_said
from tests.twin import Twin, texts_by_block

WAIT_S = 300
SMALL = Preset(height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", fps=8)
FILM = GenerationRequest(
    prompt="a cat\n[3s] sits\n[2.5s blend] runs\n[2s cut] sleeps on a red chair\n[1s] sits", seed=7, context="cached", refresh=3
)


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(tiny, tmp_path_factory.mktemp("outputs")) as engine:
        yield engine


@pytest.fixture(scope="module")
def film(engine: Engine) -> Any:
    job = engine.submit(FILM, return_latents=True, export_images=True)
    return job, job.result(WAIT_S)


def test_the_twin_says_the_same(engine: Engine, tiny: Path, film: Any) -> None:
    settings, plan = film[0].request, plan_of(film[0].request)
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    negative = encoder.encode(SMALL.negative_prompt)
    shots = [(s.latents_num, encoder.encode(f"a cat {s.prompt}"), s.transition) for s in settings.shots]
    texts = [[text, negative] for text in texts_by_block(shots, plan.lengths)]
    blocks = Twin(tiny).run(
        latents_num=settings.latents_num, num_per_block=3, num_cat=2, steps=4, texts=texts, seed=7,
        text_of_block=range(plan.num_blocks), scenes=scenes_of(settings.shots), **as_said(rules_of(settings)),
    )  # fmt: skip
    assert plan.lengths == (5, 2, 3, 2, 5, 2) and plan.cuts == (4,)
    found = film[1].latents
    assert (found - torch.cat([blocks[number] for number in range(plan.num_blocks)], dim=2)).abs().max() <= 1e-5


def decoded_alone(folder: Path, latents: np.ndarray, scenes: list[int]) -> np.ndarray:
    """Frames of scenes of so many latents, each decoded in one go."""
    torch.set_num_threads(1)
    decoder = StreamingDecoder.load(Checkpoint(folder), device="cpu")
    frames = []
    for scene in torch.from_numpy(latents).split(scenes, dim=2):
        decoder.begin()
        frames.append(to_uint8(decoder.decode(scene.contiguous())))
    return torch.cat(frames).numpy()


def test_frames_are_those_of_each_scene_alone(tiny: Path, film: Any) -> None:
    job, result = film
    settings = job.request
    # In a process that has done nothing else, as the codec's: what ran before in this one may have changed how it rounds.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as afresh:
        scenes = [sum(scene) for scene in scenes_of(settings.shots)]
        expected = afresh.submit(decoded_alone, tiny, result.latents.numpy(), scenes).result(WAIT_S)
    pictures = sorted((job.folder.path / "frames").glob("*.png"))
    assert np.array_equal(np.stack([np.asarray(Image.open(picture)) for picture in pictures]), expected)
    started = next(event for event in job.folder.events() if isinstance(event, Started))
    assert started.num_frames == settings.num_frames == result.num_frames == len(expected) == count_frames(result.path)


def test_the_mp4_tells_the_timeline(engine: Engine, film: Any) -> None:
    job, result = film
    again = engine.resolve(read_settings(result.path))
    assert again == job.request == JobFolder(job.folder.path).request()
    assert (
        written(again) == FILM.model_copy().prompt + "\n[3s] sits\n[2.5s blend] runs\n[2s cut] sleeps on a red chair\n[1s] sits"
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_ranks(ranks: int, tiny: Path, tmp_path: Path, film: Any, leaves_nothing: None) -> None:
    with open_engine(tiny, tmp_path, ranks=ranks) as other:
        assert torch.equal(other.submit(FILM, return_latents=True).result(WAIT_S).latents, film[1].latents)


def test_two_experts(tiny_two: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        with open_engine(tiny_two, tmp_path, ranks=ranks) as engine:
            found.append(engine.submit(FILM, return_latents=True).result(WAIT_S).latents)
    assert torch.equal(*found)


def test_a_film_of_one_shot_is_a_film(engine: Engine) -> None:
    plain = GenerationRequest(prompt="a cat sits", latents_num=15, seed=3)
    shot = GenerationRequest(prompt="a cat", shots=[{"prompt": "sits", "latents_num": 15}], seed=3)
    one, other = (engine.submit(request, return_latents=True).result(WAIT_S) for request in (plain, shot))
    assert torch.equal(one.latents, other.latents)


def test_killed_and_resumed_on_other_ranks(tiny: Path, tmp_path: Path) -> None:
    request = FILM.model_copy(update={"num_inference_steps": IS_SLOW})
    with open_engine(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(request)
        assert wait_until(lambda: saved_item(job.folder) > 60, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
        whole = engine.submit(request, return_latents=True).result(WAIT_S)
    assert torch.equal(resumed.latents, whole.latents)
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()


def test_a_text_too_long_is_named(engine: Engine) -> None:
    job = engine.submit(GenerationRequest(prompt="[1s] a\n[1s] " + "b " * 255 + "c dog"))
    job.result(WAIT_S)
    notices = [event.notice for event in job.folder.events() if isinstance(event, Started)]
    assert notices[-1] == "the text of shot 2 is longer than the model's 512 tokens: “dog” and what follows it are left out"


def test_what_does_not_go_with_shots(engine: Engine) -> None:
    with pytest.raises(RequestError, match="prompt_embeds are of one text, and the request has shots"):
        engine.submit(FILM, prompt_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(RequestError, match="plain Wan takes one prompt; compare a film without shots"):
        engine.compare(FILM)
