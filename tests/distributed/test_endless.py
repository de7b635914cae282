"""Endless films by the real engine: wrapped up whenever it is asked for, the film is the one that was submitted with the length
that came of it (METHOD.md, invariant 8)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal import Engine, GenerationRequest, RequestError, WorkerDied, WrappedUp
from dualparal.engine import dispatcher
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.job import Job
from dualparal.media.metadata import read_settings
from dualparal.method.endless import BLOCKS_AHEAD
from dualparal.method.rules import plan_of
from dualparal.presets import Limits
from tests.conftest import wait_until
from tests.distributed.hooks import IS_SLOW
from tests.distributed.test_resume import saved_item
from tests.distributed.test_steering import SMALL, WAIT_S, check_same, open_engine, steps_done

ALL_OF_IT = 1e9  # seconds that are played
PREVIEW: dict[str, Any] = {"schedule": "preview", "context": "cached", "refresh": 3, "max_in_flight": 3}
ENDLESS = GenerationRequest(prompt="a cat sits", is_endless=True, seed=7, **PREVIEW)
SHOTS = GenerationRequest(
    prompt="a cat\n[2s] sits\n[2s cut] runs", is_endless=True, schedule="paper", context="recomputed", seed=3,
    num_inference_steps=IS_SLOW,
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(tiny, tmp_path_factory.mktemp("outputs")) as engine:
        yield engine


def num_ready(job: Job) -> int:
    return len(job.view().blocks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_longer_than_planned_steered_and_wrapped_up(ranks: int, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with open_engine(tiny, tmp_path, ranks=ranks) as engine:
        job = engine.submit(ENDLESS, return_latents=True)
        assert wait_until(lambda: num_ready(job) > 2, WAIT_S)
        job.steer("a dog runs", "blend")
        assert wait_until(lambda: num_ready(job) > BLOCKS_AHEAD + 4, WAIT_S)
        told = job.finish()
        result = job.result(WAIT_S)
    assert not job.request.is_endless and job.request.shots is not None and job.request.shots[-1].prompt == "a dog runs"
    assert told.num_frames == result.num_frames and told.num_blocks == plan_of(job.request).num_blocks == num_ready(job)
    assert [event for event in job.folder.events() if isinstance(event, WrappedUp)] == [told]
    assert read_settings(result.path) == job.request.as_request() and JobFolder(job.folder.path).request() == job.request
    check_same(plain, job.request, result)


def is_held(job: Job) -> bool:
    progress = job.view().progress
    return progress is not None and progress.is_held


def is_telling(job: Job, played_s: float, until: Callable[[], bool]) -> bool:
    """Play so much of it, as a page does, until something is so; whether it ever is."""

    def look() -> bool:
        job.tell_played(played_s)
        return until()

    return wait_until(look, WAIT_S)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_waits_for_who_watches_and_pauses_change_no_bit(ranks: int, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with open_engine(tiny, tmp_path, ranks=ranks) as engine:
        job = engine.submit(ENDLESS.model_copy(update={"lead": 1.0}), return_latents=True)
        assert is_telling(job, 0, lambda: is_held(job)), "nothing is played"
        entered = entered_blocks(job)
        for _ in range(20):
            job.tell_played(0)
            time.sleep(0.02)
        assert entered_blocks(job) == entered and is_held(job)
        for _ in range(3):
            entered = entered_blocks(job)
            assert is_telling(job, ALL_OF_IT, lambda: entered_blocks(job) > entered), "it goes on as it is played"  # noqa: B023
            assert wait_until(lambda: is_held(job), WAIT_S), "and waits again"
        told = job.steer("a dog runs")  # while it waits
        assert is_telling(job, ALL_OF_IT, lambda: num_ready(job) > told.block)
        assert wait_until(lambda: is_held(job), WAIT_S)
        job.finish()
        result = job.result(WAIT_S)
    assert job.request.shots is not None and job.request.shots[-1].prompt == "a dog runs"
    check_same(plain, job.request, result)


def entered_blocks(job: Job) -> int:
    progress = job.view().progress
    return 0 if progress is None else sum(steps > 0 for steps in progress.block_steps)


def test_a_film_that_waits_can_be_stopped(tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path, ranks=2) as engine:
        job = engine.submit(ENDLESS.model_copy(update={"lead": 0.0}))
        assert is_telling(job, 0, lambda: is_held(job))
        job.cancel()
        assert wait_until(lambda: job.has_ended, WAIT_S) and job.state == "cancelled"
        assert engine.submit(GenerationRequest(prompt="a dog", latents_num=1)).result(WAIT_S).num_frames == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_shots_and_an_early_end(ranks: int, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with open_engine(tiny, tmp_path, ranks=ranks, worker_hook="tests.distributed.hooks:faults") as engine:
        job = engine.submit(SHOTS, return_latents=True)
        assert wait_until(lambda: steps_done(job) > 3, WAIT_S)
        job.finish()
        with pytest.raises(RequestError, match="only an endless one is wrapped up"):
            job.finish()
        result = job.result(WAIT_S)
    check_same(plain, job.request, result)


@pytest.mark.parametrize("is_finished", [False, True])
def test_killed(is_finished: bool, tiny: Path, tmp_path: Path, plain: Engine) -> None:
    with open_engine(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(ENDLESS.model_copy(update={"num_inference_steps": IS_SLOW}))
        assert wait_until(lambda: saved_item(job.folder) > 5, WAIT_S), "no sweep was saved"
        if is_finished:
            job.finish()
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True)
        if not is_finished:
            assert wait_until(lambda: num_ready(resumed) > 3, WAIT_S)
            resumed.finish()
        result = resumed.result(WAIT_S)
    check_same(plain, resumed.request, result)


def test_the_disk_quota_ends_it_with_a_finished_film(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "LOOK_FOR_ROOM_S", 0.0)  # in a second a film of this size may grow by megabytes
    with open_engine(tiny, tmp_path, max_disk_bytes=3_000_000) as engine:
        job = engine.submit(ENDLESS)
        result = job.result(WAIT_S)
    assert result.num_frames == job.request.num_frames > 0 and not job.request.is_endless
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 3_000_000


def test_it_gives_way_to_others_once_it_is_as_long_as_films_may_be(tiny: Path, tmp_path: Path, plain: Engine) -> None:
    preset = SMALL.model_copy(update={"seconds": 2.0, "limits": Limits(seconds=3)})
    with open_engine(tiny, tmp_path, preset=preset) as engine:
        job = engine.submit(ENDLESS, return_latents=True)
        assert wait_until(lambda: num_ready(job) > 4, WAIT_S), "with nobody in line it goes on"
        assert job.request.is_endless
        other = engine.submit(GenerationRequest(prompt="a dog", latents_num=1))
        result = job.result(WAIT_S)
        assert other.result(WAIT_S).num_frames == 1
    assert not job.request.is_endless and result.num_frames >= 3 * job.request.fps
    check_same(plain, job.request, result)


def test_stopped_and_what_is_refused(tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path, worker_hook="tests.distributed.hooks:faults") as engine:
        with pytest.raises(RequestError, match="the tensors given are those of a film with an end"):
            engine.submit(ENDLESS, prompt_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(RequestError, match="plain Wan makes no endless film"):
            engine.compare(ENDLESS)
        job = engine.submit(ENDLESS.model_copy(update={"num_inference_steps": IS_SLOW}))
        waiting = engine.submit(ENDLESS)
        with pytest.raises(RequestError, match="is queued; only a running film is wrapped up"):
            waiting.finish()
        assert wait_until(lambda: num_ready(job) > 0, WAIT_S)
        for one in (waiting, job):
            one.cancel()
            assert wait_until(lambda: one.has_ended, WAIT_S)  # noqa: B023
        assert job.state == "cancelled" and job.folder.video.is_file()
