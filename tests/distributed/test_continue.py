"""A film that goes on from another, by the real engine: the twin's numbers, one decode's frames, the same bits on any ranks and
after a kill, and the two joined without being encoded again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dualparal import Engine, GenerationRequest, RequestError, Started, WorkerDied
from dualparal.files import CLIP, START_CLIP, checksum_of
from dualparal.jobs.job import Job, JobResult
from dualparal.media.film import last_frames
from dualparal.media.metadata import describe, read_settings
from dualparal.method.plan import KEPT_LATENTS
from dualparal.method.rules import plan_of, rules_of
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
CACHED: dict[str, Any] = {"context": "cached", "schedule": "preview", "refresh": 3}
Film = tuple[Job, JobResult]


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


def make(engine: Engine, request: Any) -> Film:
    job = engine.submit(request, return_latents=True, export_images=True)
    return job, job.result(WAIT_S)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def engine(tiny: Path, outputs: Path) -> Iterator[Engine]:
    with open_engine(tiny, outputs) as engine:
        yield engine


@pytest.fixture(scope="module")
def first(engine: Engine) -> Film:
    return make(engine, GenerationRequest(prompt="a cat", latents_num=7, seed=3))


@pytest.fixture(scope="module")
def second(engine: Engine, first: Film) -> Film:
    return make(
        engine, GenerationRequest(prompt="a dog", latents_num=8, seed=7, continue_from=first[0].id, join=True, **CACHED)
    )


def pictures(job: Job) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((job.folder.path / "frames").glob("*.png"))])


def decoded(video: Path) -> list[str]:
    """A checksum of each frame of an mp4."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "framemd5", "-"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    return [line.rsplit(",", 1)[1].strip() for line in lines if not line.startswith("#")]


def test_the_twin_says_the_same(tiny: Path, first: Film, second: Film) -> None:
    job, result = second
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    texts = [[encoder.encode(text) for text in ("a dog", SMALL.negative_prompt)]]
    assert first[1].latents is not None and result.latents is not None
    ghost = first[1].latents[:, :, -2:]
    blocks = Twin(tiny).run(
        latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=texts, seed=7, size=ghost.shape[3:], ghost=ghost,
        **as_said(rules_of(job.request)),
    )  # fmt: skip
    expected = torch.cat([blocks[number] for number in sorted(blocks)], dim=2)
    assert plan_of(job.request).lengths == (3, 3, 2)
    assert result.latents.shape[2] == 8 and (result.latents - expected).abs().max() <= 1e-5


def test_frames_are_those_of_one_decode(tiny: Path, first: Film, second: Film) -> None:
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    films = [film.latents for _, film in (first, second)]
    assert films[0] is not None and films[1] is not None
    expected = to_uint8(decoder.decode(torch.cat(films, dim=2))).numpy()
    found = np.concatenate([pictures(first[0]), pictures(second[0])])
    assert len(found) == 25 + 32 and np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    started = next(event for event in second[0].folder.events() if isinstance(event, Started))
    assert started.num_frames == second[0].request.num_frames == second[1].num_frames == 32


def test_joined_without_being_encoded_again(first: Film, second: Film) -> None:
    both = decoded(Path(second[1].path))
    assert describe(second[1].path)["num_frames"] == 25 + 32 == second[0].request.num_frames_before + 32
    assert both[:25] == decoded(Path(first[1].path)), "the first film's frames are as they were"
    asked = read_settings(second[1].path)
    assert asked.continue_from is None and asked.prompt == "a dog", "it has to be given again"
    assert first[0].id not in str(describe(second[1].path)["settings"])


def test_what_was_asked_for_alone(engine: Engine, second: Film) -> None:
    alone = make(engine, second[0].request.model_copy(update={"join": False}))
    assert torch.equal(alone[1].latents, second[1].latents)  # type: ignore[arg-type]
    assert decoded(Path(alone[1].path)) == decoded(Path(second[1].path))[25:] and alone[0].request.num_frames_before == 0


def test_a_continuation_is_continued(tiny: Path, engine: Engine, first: Film, second: Film) -> None:
    """Short ones in a row: what is kept reaches back over all of them, up to its length."""
    shot = GenerationRequest(prompt="x\n[0.5s] a cat\n[1s blend] a dog", seed=1, continue_from=second[0].id, join=True)
    third = make(engine, shot)
    assert third[0].request.latents_num == 3 and third[1].num_frames == 12
    fourth = make(engine, GenerationRequest(prompt="a dog", num_frames=24, seed=1, continue_from=third[0].id, join=True))
    assert describe(fourth[1].path)["num_frames"] == 25 + 32 + 12 + 24
    films = torch.cat([film[1].latents for film in (first, second, third, fourth)], dim=2)  # type: ignore[misc]
    assert films.shape[2] == KEPT_LATENTS
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    expected = to_uint8(decoder.decode(films)).numpy()[-24:]
    assert np.abs(pictures(fourth[0]).astype(int) - expected.astype(int)).max() <= 1
    assert fourth[0].request.ghost == 18


def test_what_follows_a_cut_alone_is_continued(tiny: Path, engine: Engine) -> None:
    before = make(engine, GenerationRequest(prompt="x\n[1s] a cat\n[1s cut] a dog", seed=1))
    after = make(engine, GenerationRequest(prompt="a dog", latents_num=2, seed=1, continue_from=before[0].id))
    assert after[0].request.ghost == 3
    decoder = StreamingDecoder.load(Checkpoint(tiny), device="cpu")
    scene = torch.cat([before[1].latents[:, :, -3:], after[1].latents], dim=2)  # type: ignore[index, list-item]
    expected = to_uint8(decoder.decode(scene)).numpy()[-8:]
    assert np.abs(pictures(after[0]).astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_ranks(ranks: int, tiny: Path, outputs: Path, second: Film, leaves_nothing: None) -> None:
    with open_engine(tiny, outputs, ranks=ranks) as other:
        found = make(other, second[0].request)
    assert torch.equal(found[1].latents, second[1].latents)  # type: ignore[arg-type]
    assert Path(found[1].path).read_bytes() == Path(second[1].path).read_bytes()


def test_two_experts(tiny_two: Path, tmp_path: Path) -> None:
    found: list[Film] = []
    for ranks in (1, 2):
        with open_engine(tiny_two, tmp_path, ranks=ranks) as engine:
            if not found:
                before = make(engine, GenerationRequest(prompt="a cat", latents_num=4, seed=2))
            request = GenerationRequest(prompt="a dog", latents_num=7, seed=3, continue_from=before[0].id)
            found.append(make(engine, request))
    assert torch.equal(found[0][1].latents, found[1][1].latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_killed_and_resumed_when_the_first_is_gone(context: str, tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        before = make(engine, GenerationRequest(prompt="a cat", latents_num=4, seed=2))
        rules = CACHED if context == "cached" else {"context": context}
        request = GenerationRequest(
            prompt="a dog", latents_num=20, num_inference_steps=IS_SLOW, seed=1, continue_from=before[0].id, join=True, **rules
        )
        whole = make(engine, request)
        job = engine.submit(request)
        before[0].folder.delete()
        assert wait_until(lambda: saved_item(job.folder) > 10, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny, tmp_path, ranks=3) as engine:
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
    assert torch.equal(resumed.latents, whole[1].latents)  # type: ignore[arg-type]
    assert Path(resumed.path).read_bytes() == Path(whole[1].path).read_bytes()


def test_a_stopped_film_is_continued_from_where_it_was_stopped(tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path, worker_hook="tests.distributed.hooks:faults") as engine:
        job = engine.submit(GenerationRequest(prompt="a cat", latents_num=30, num_inference_steps=IS_SLOW, seed=2, **CACHED))
        with pytest.raises(RequestError, match=f"continue_from: job {job.id} has not ended"):
            engine.submit(GenerationRequest(prompt="a dog", latents_num=3, continue_from=job.id))
        assert wait_until(lambda: len(job.view().blocks) > 0, WAIT_S)
        job.cancel()
        assert wait_until(lambda: job.has_ended, WAIT_S)
        stopped = describe(job.folder.video)["num_frames"]
        after = make(engine, GenerationRequest(prompt="a dog", latents_num=3, seed=1, continue_from=job.id, join=True))
    assert describe(after[1].path)["num_frames"] == stopped + 12


def test_a_video_file(tiny: Path, engine: Engine, first: Film, tmp_path: Path) -> None:
    """It is seen as a film that was made here is, but for the way through pixels; its end is kept with the job."""
    given = tmp_path / "a clip.mp4"
    given.write_bytes(Path(first[1].path).read_bytes())
    request = GenerationRequest(prompt="a dog", latents_num=8, seed=7, continue_from=str(given), **CACHED)
    found = make(engine, request)
    settings = found[0].request
    assert (settings.ghost, settings.fitted, found[1].num_frames) == (7, "", 32)
    assert settings.continue_from == f"{CLIP}{checksum_of((found[0].folder.path / START_CLIP).read_bytes())}"
    assert str(given) not in (found[0].folder.path / "request.json").read_text()
    frames = last_frames(given, 48, 32, 7)
    ghost = StreamingDecoder.load(Checkpoint(tiny), device="cpu").encode_clip(torch.from_numpy(frames))
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    texts = [[encoder.encode(text) for text in ("a dog", SMALL.negative_prompt)]]
    blocks = Twin(tiny).run(
        latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=texts, seed=7, size=ghost.shape[3:], ghost=ghost[:, :, -2:],
        **as_said(rules_of(settings)),
    )  # fmt: skip
    expected = torch.cat([blocks[number] for number in sorted(blocks)], dim=2)
    assert found[1].latents is not None and (found[1].latents - expected).abs().max() <= 1e-4
    given.unlink()
    with open_engine(tiny, tmp_path / "outputs", ranks=2) as other:
        again = make(other, request.model_copy(update={"continue_from": str(found[0].folder.path / START_CLIP)}))
    assert torch.equal(again[1].latents, found[1].latents)  # type: ignore[arg-type]


def test_a_video_file_after_a_kill(tiny: Path, first: Film, tmp_path: Path) -> None:
    request = GenerationRequest(
        prompt="a dog", latents_num=20, num_inference_steps=IS_SLOW, seed=1, continue_from=first[1].path, fps=4, **CACHED
    )
    with open_engine(tiny, tmp_path, ranks=2, worker_hook="tests.distributed.hooks:saves_often") as engine:
        job = engine.submit(request)
        assert job.request.fitted == "of the video that is continued 8 frames a second became 4"
        assert wait_until(lambda: saved_item(job.folder) > 10, WAIT_S), "no sweep was saved"
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    with open_engine(tiny, tmp_path) as engine:
        whole = make(engine, request)
        resumed = engine.resume(job.id, return_latents=True).result(WAIT_S)
    assert torch.equal(resumed.latents, whole[1].latents)  # type: ignore[arg-type]


def test_what_is_refused(engine: Engine, first: Film, outputs: Path) -> None:
    before = sorted(outputs.iterdir())
    unknown = "0" * 12
    for values, said in (
        ({"continue_from": unknown}, f"there is no job {unknown} here"),
        ({"continue_from": "../etc"}, "there is neither a job nor a file of this name"),
        ({"continue_from": str(first[0].folder.video), "join": True}, "only a film that was made here can be joined"),
        ({"continue_from": str(first[0].folder.end)}, "the file is neither mp4, mov nor webm"),
        ({"num_cat": 0}, "with num_cat=0 no block would see the film"),
        ({"height": 64}, f"job {first[0].id} has pictures of 48 x 32 and this film of 48 x 64; leave width and height out"),
        ({"fps": 9, "join": True}, "has 8 frames per second and this film 9; leave out fps or join"),
        ({"num_frames": 33}, "num_frames=33: must be 4k; use 32 or 36"),
        ({"start_image": "a.png"}, "both say what the film begins with"),
        ({"continue_from": None, "join": True}, "there is no film to join"),
    ):
        with pytest.raises(RequestError, match=said):
            engine.submit(GenerationRequest(**{"prompt": "a cat", "continue_from": first[0].id, **values}))
    with pytest.raises(RequestError, match="plain Wan continues no film"):
        engine.compare(GenerationRequest(prompt="a cat", continue_from=first[0].id))
    assert sorted(outputs.iterdir()) == before


def test_what_is_damaged_is_found_out(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    with open_engine(tiny, tmp_path) as other:
        film = make(other, GenerationRequest(prompt="a cat", latents_num=2, seed=1))
        kept = film[0].folder.end
        kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
        job = other.submit(GenerationRequest(prompt="a dog", latents_num=2, continue_from=film[0].id))
        with pytest.raises(Exception, match=r"the end of the film to be continued is lost: .* is damaged"):
            job.result(WAIT_S)
        kept.unlink()
        with pytest.raises(RequestError, match="has not kept the end of its video"):
            other.submit(GenerationRequest(prompt="a dog", latents_num=2, continue_from=film[0].id))
        assert make(other, GenerationRequest(prompt="a cat", latents_num=2))[1].num_frames == 5, "the engine goes on"
