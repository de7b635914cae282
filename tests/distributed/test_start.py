"""A film that begins with a picture, by the real engine: the twin's numbers, the same bits on any ranks and after a kill."""

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

from dualparal import Engine, GenerationRequest, RequestError, Started, WorkerDied
from dualparal.files import checksum_of
from dualparal.media.metadata import describe, read_settings
from dualparal.method.rules import rules_of
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_resume import saved_item
from tests.texts import as_said
from tests.twin import Twin

WAIT_S = 300
SMALL = Preset(height=32, width=48, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", fps=8)


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a rose.jpg"
    Image.effect_noise((90, 60), 90).convert("RGB").save(path, quality=95)
    return path


@pytest.fixture(scope="module")
def request_(picture: Path) -> GenerationRequest:
    return GenerationRequest(
        prompt="a cat", latents_num=9, seed=7, context="cached", schedule="preview", refresh=3, start_image=str(picture)
    )


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(tiny, tmp_path_factory.mktemp("outputs")) as engine:
        yield engine


@pytest.fixture(scope="module")
def film(engine: Engine, request_: GenerationRequest) -> Any:
    job = engine.submit(request_, return_latents=True, export_images=True)
    return job, job.result(WAIT_S)


def test_the_twin_says_the_same(tiny: Path, film: Any) -> None:
    job, result = film
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    texts = [[encoder.encode(text) for text in ("a cat", SMALL.negative_prompt)]]
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    seen = np.asarray(Image.open(job.folder.start_image))
    ghost = decoder.encode_picture(torch.from_numpy(seen.copy()))
    assert (result.latents[:, :, :1] - ghost).abs().max() <= 1e-5, "the film's first latent is the picture's"
    blocks = Twin(tiny).run(
        latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=texts, seed=7, size=ghost.shape[3:], ghost=ghost,
        **as_said(rules_of(job.request)),
    )  # fmt: skip
    expected = torch.cat([blocks[number] for number in sorted(blocks)], dim=2)
    assert result.latents.shape[2] == 9 and (result.latents[:, :, 1:] - expected).abs().max() <= 1e-5


def test_the_picture_is_shown_and_counted(tiny: Path, film: Any) -> None:
    job, result = film
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    expected = to_uint8(decoder.decode(result.latents)).numpy()
    pictures = sorted((job.folder.path / "frames").glob("*.png"))
    found = np.stack([np.asarray(Image.open(picture)) for picture in pictures])
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    started = next(event for event in job.folder.events() if isinstance(event, Started))
    assert started.num_frames == job.request.num_frames == result.num_frames == 33 == describe(result.path)["num_frames"]


def test_the_record_holds_the_picture_by_its_digest(engine: Engine, film: Any, picture: Path) -> None:
    job, result = film
    assert job.request.start_image == checksum_of(job.folder.start_image.read_bytes())
    with Image.open(job.folder.start_image) as kept:
        assert kept.size == (48, 32)
    assert str(picture) not in (job.folder.path / "request.json").read_text()
    assert read_settings(result.path).start_image is None, "it has to be given again"
    again = engine.submit(job.request.model_copy(update={"start_image": str(job.folder.start_image)}), return_latents=True)
    assert again.request == job.request and torch.equal(again.result(WAIT_S).latents, result.latents)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_ranks(
    ranks: int, tiny: Path, tmp_path: Path, film: Any, request_: GenerationRequest, leaves_nothing: None
) -> None:
    with open_engine(tiny, tmp_path, ranks=ranks) as other:
        job = other.submit(film[0].request.model_copy(update={"start_image": request_.start_image}), return_latents=True)
        result = job.result(WAIT_S)
    assert torch.equal(result.latents, film[1].latents)
    assert Path(result.path).read_bytes() == Path(film[1].path).read_bytes()


def test_a_model_that_was_trained_for_it(tiny_ti2v: Path, tmp_path: Path, picture: Path, leaves_nothing: None) -> None:
    """The picture is clean, at timestep 0; sizes are multiples of 32."""
    asked = GenerationRequest(prompt="a cat", latents_num=9, seed=7, start_image=str(picture))
    preset, found = SMALL.model_copy(update={"height": 64, "width": 96}), []
    for ranks in (1, 2):
        with open_engine(tiny_ti2v, tmp_path, ranks=ranks, preset=preset) as engine:
            with pytest.raises(RequestError, match="width=48 does not fit this model, whose pictures are multiples of 32"):
                engine.submit(GenerationRequest(prompt="a cat", width=48))
            job = engine.submit(asked, return_latents=True)
            found.append(job.result(WAIT_S))
            asked = job.request.model_copy(update={"start_image": str(picture)})
    assert torch.equal(found[0].latents, found[1].latents)
    assert Path(found[0].path).read_bytes() == Path(found[1].path).read_bytes()
    assert describe(found[0].path)["num_frames"] == 33
    checkpoint = Checkpoint(tiny_ti2v)
    encoder = TextEncoder(checkpoint, device="cpu", dtype=torch.float32)
    texts = [[encoder.encode(text) for text in ("a cat", SMALL.negative_prompt)]]
    ghost = StreamingDecoder.load(checkpoint, device="cpu").encode_picture(
        torch.from_numpy(np.asarray(Image.open(job.folder.start_image)).copy())
    )
    blocks = Twin(tiny_ti2v).run(
        latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=texts, seed=7, size=(4, 6), ghost=ghost, is_ghost_clean=True,
        **as_said(rules_of(job.request)),
    )  # fmt: skip
    expected = torch.cat([ghost, *(blocks[number] for number in sorted(blocks))], dim=2)
    assert (found[0].latents - expected).abs().max() <= 1e-5


def test_two_experts_and_shots(tiny_two: Path, tmp_path: Path, picture: Path) -> None:
    film = GenerationRequest(prompt="a cat\n[2s] sits\n[2s blend] runs\n[1s cut] sleeps", seed=3, start_image=str(picture))
    found = []
    for ranks in (1, 2):
        with open_engine(tiny_two, tmp_path, ranks=ranks) as engine:
            job = engine.submit(film, return_latents=True)
            found.append(job.result(WAIT_S))
            assert found[-1].num_frames == job.request.num_frames
    assert torch.equal(found[0].latents, found[1].latents)


@pytest.mark.parametrize("is_kept", [True, False])
def test_killed_and_resumed_on_other_ranks(
    is_kept: bool, tiny: Path, tmp_path: Path, request_: GenerationRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = request_.model_copy(update={"num_inference_steps": IS_SLOW, "latents_num": 24})
    with open_engine(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:faults") as engine:
        job = engine.submit(request)
        assert wait_until(lambda: saved_item(job.folder) > 20, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    kept = job.folder.path / "state" / "ghost.safetensors"
    assert kept.is_file()
    if not is_kept:
        kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\1")
    with open_engine(tiny, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
        settings = job.request.model_copy(update={"start_image": request.start_image})
        whole = engine.submit(settings, return_latents=True).result(WAIT_S)
    assert torch.equal(resumed.latents, whole.latents)
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()


def test_another_picture_in_its_place_is_found_out(tiny: Path, tmp_path: Path, request_: GenerationRequest) -> None:
    with open_engine(tiny, tmp_path) as engine:
        engine.submit(request_.model_copy(update={"latents_num": 60})).cancel()
        waiting = engine.submit(request_)
        waiting.folder.start_image.write_bytes(b"another")
        with pytest.raises(Exception, match="is not the picture that the job was given"):
            waiting.result(WAIT_S)
        assert engine.submit(request_).result(WAIT_S).num_frames == 33, "the engine goes on"


def test_what_is_refused(engine: Engine, picture: Path, tmp_path: Path) -> None:
    before = sorted(engine.outputs.iterdir())
    for values, said in (
        ({"num_cat": 0}, "with num_cat=0 no block would see the picture"),
        ({"latents_num": 1}, "the picture is the first of the film's latent frames"),
        ({"seconds": 0.01}, "the picture is the first of the film's latent frames"),
        ({"start_image": str(tmp_path / "none.png")}, "there is no such file"),
        ({"start_image": __file__}, "neither PNG, JPEG nor WebP"),
    ):
        with pytest.raises(RequestError, match=said):
            engine.submit(GenerationRequest(**{"prompt": "a cat", "start_image": str(picture), **values}))
    with pytest.raises(RequestError, match="the picture is the first of the first shot's latent frames"):
        engine.submit(GenerationRequest(prompt="a cat\n[0.1s] sits\n[2s] runs", start_image=str(picture)))
    with pytest.raises(RequestError, match="plain Wan takes no picture"):
        engine.compare(GenerationRequest(prompt="a cat", start_image=str(picture)))
    assert sorted(engine.outputs.iterdir()) == before
