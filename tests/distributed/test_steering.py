"""Steering by the real engine: whenever it comes, the film is the one that the timeline which came of it would have been
(METHOD.md, invariant 8)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dualparal import Engine, GenerationRequest, RequestError, Settings, Steered, WorkerDied
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.job import Job, JobResult
from dualparal.media.metadata import read_settings
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_engine import count_frames
from tests.distributed.test_resume import saved_item

WAIT_S = 300
SMALL = Preset(height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", fps=8)
SLOW: dict[str, Any] = {"num_inference_steps": IS_SLOW, "seed": 7}
PREVIEW = GenerationRequest(
    prompt="a cat sits", latents_num=20, schedule="preview", context="cached", refresh=3, max_in_flight=3, **SLOW
)
PAPER = GenerationRequest(prompt="a cat\n[9s] sits\n[5s cut] runs\n[6s] sleeps", schedule="paper", context="recomputed", **SLOW)
OWN_STEP = GenerationRequest(
    prompt="a cat\n[5s] sits\n[5s cut] runs", schedule="preview", context="recomputed", max_in_flight=3, micro_batches=True,
    cache_interval=2, **SLOW,
)  # fmt: skip


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


@contextlib.contextmanager
def steerable(folder: Path, outputs: Path, **options: Any) -> Iterator[Engine]:
    """An engine that encodes a new text at once: what that needs is imported with the first one, which takes seconds, and the
    last block of a short film may have entered meanwhile."""
    with open_engine(folder, outputs, **options) as engine:
        engine.submit(GenerationRequest(prompt=f"new here: {outputs}", latents_num=1, num_inference_steps=1)).result(WAIT_S)
        yield engine


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Makes at once what others were steered to."""
    with open_engine(tiny, tmp_path_factory.mktemp("outputs")) as engine:
        yield engine


def steps_done(job: Job) -> int:
    progress = job.view().progress
    return 0 if progress is None else progress.items_done


def check_same(plain: Engine, settings: Settings, result: JobResult) -> None:
    """The film is the one that was asked for with `settings` from the start, bit by bit."""
    whole = plain.submit(settings, return_latents=True).result(WAIT_S)
    assert result.latents is not None and whole.latents is not None
    assert torch.equal(result.latents, whole.latents)
    assert Path(result.path).read_bytes() == Path(whole.path).read_bytes()
    assert result.num_frames == whole.num_frames == count_frames(result.path) == settings.num_frames


@pytest.mark.parametrize(
    ("ranks", "request_"), [(1, PREVIEW), (2, PREVIEW), (3, PREVIEW), (1, OWN_STEP), (2, OWN_STEP), (2, PAPER), (3, PAPER)]
)
def test_steered_is_submitted(ranks: int, request_: GenerationRequest, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with steerable(tiny, tmp_path, ranks=ranks, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(request_, return_latents=True)
        before = job.request
        assert wait_until(lambda: steps_done(job) > 5 * ranks, WAIT_S)
        first = job.steer("a dog runs", "blend")
        last = job.steer("a dog sleeps", "switch")  # most likely before the same block: then the last one wins
        assert wait_until(lambda: steps_done(job) > 20, WAIT_S)
        if request_ is not PAPER:  # where all enter early
            last = job.steer("a dog on a red chair", "cut")
        result = job.result(WAIT_S)
    check_same(plain, job.request, result)
    shots = job.request.shots
    assert first.block >= 1 and shots is not None and job.request.latents_num == before.latents_num
    assert (shots[-1].prompt, shots[-1].transition) == (last.prompt, last.transition)
    assert read_settings(result.path) == job.request.as_request() and JobFolder(job.folder.path).request() == job.request
    assert [event for event in job.folder.events() if isinstance(event, Steered)][-1] == last
    begun = sum(shot.latents_num or 0 for shot in shots[:-1])
    assert last.num_frames == job.request.num_frames and last.from_s <= begun * 4 / job.request.fps


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_film_that_began_with_a_picture(ranks: int, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture)
    asked = PREVIEW.model_copy(update={"start_image": str(picture)})
    with steerable(tiny, tmp_path / "outputs", ranks=ranks, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(asked, return_latents=True)
        assert wait_until(lambda: steps_done(job) > 5 * ranks, WAIT_S)
        told = job.steer("a dog runs", "blend")
        result = job.result(WAIT_S)
    assert told.block >= 1
    again = job.request.as_request().model_copy(update={"start_image": str(picture)})
    whole = plain.submit(again, return_latents=True)
    expected = whole.result(WAIT_S)
    assert whole.request == job.request
    assert result.latents is not None and expected.latents is not None and torch.equal(result.latents, expected.latents)
    assert Path(result.path).read_bytes() == Path(expected.path).read_bytes()
    assert count_frames(result.path) == job.request.num_frames


@pytest.mark.parametrize("is_saved_since", [False, True])
def test_killed_after_steering(is_saved_since: bool, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with steerable(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(PREVIEW.model_copy(update={"num_inference_steps": 8}))
        assert wait_until(lambda: saved_item(job.folder) > 5, WAIT_S), "no sweep was saved"
        answer, saved = job.steer("a dog runs"), saved_item(job.folder)
        if is_saved_since:
            assert wait_until(lambda: saved_item(job.folder) > saved, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True)
        result = resumed.result(WAIT_S)
    assert resumed.request == job.request and resumed.request.shots is not None
    assert resumed.request.shots[-1].prompt == answer.prompt
    check_same(plain, resumed.request, result)


def test_goes_on_by_itself_as_it_was_steered(tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with steerable(tiny, tmp_path, auto_resume=True, worker_hook="tests.distributed.hooks:faults") as engine:
        job = engine.submit(PREVIEW, return_latents=True)
        assert wait_until(lambda: steps_done(job) > 5, WAIT_S)
        job.steer("a dog runs")
        os.kill(int(engine.workers["rank 0"]["pid"]), signal.SIGKILL)
        result = job.result(WAIT_S)
    assert job.num_interruptions == 1 and job.request.shots is not None
    check_same(plain, job.request, result)


def test_what_cannot_be_steered(tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path, worker_hook="tests.distributed.hooks:faults") as engine:
        short = engine.submit(GenerationRequest(prompt="a cat", latents_num=5, **SLOW))
        waiting = engine.submit(GenerationRequest(prompt="a cat", latents_num=5))
        assert wait_until(lambda: steps_done(short) > 1, WAIT_S)
        with pytest.raises(RequestError, match="every block of the film has entered already"):
            short.steer("a dog")
        with pytest.raises(RequestError, match="is queued; only a running job can be steered"):
            waiting.steer("a dog")
        with pytest.raises(RequestError, match="transition='fade'"):
            short.steer("a dog", "fade")
        short.result(WAIT_S)
        with pytest.raises(RequestError, match="is finished; only a running job can be steered"):
            short.steer("a dog")
        given = engine.submit(PREVIEW.model_copy(update={"prompt": "x"}), prompt_embeds=torch.zeros(1, 4, 32))
        assert wait_until(lambda: steps_done(given) > 1, WAIT_S)
        with pytest.raises(RequestError, match="the job was given tensors"):
            given.steer("a dog")
        given.cancel()
