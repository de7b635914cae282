"""The real engine: equal bits on any number of ranks, faults that stay with their job, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch

from dualparal import (
    BlockReady,
    Cancelled,
    CheckpointError,
    Engine,
    EngineError,
    Failed,
    Finished,
    GenerationRequest,
    JobCancelled,
    OutputError,
    Progress,
    Queued,
    QueueFull,
    RequestError,
    Started,
    WorkerDied,
    WorkerFailed,
)  # fmt: skip
from dualparal.cli.progress import follow
from dualparal.engine import pulse
from dualparal.jobs.job import Job
from dualparal.model.layout import Checkpoint
from dualparal.model.part_shapes import transformer_owners
from dualparal.model.text import TextEncoder
from dualparal.model.text_cache import EmbeddingCache
from dualparal.planning.calibration import cache_folder
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import FAILS_ON_RANK_1, HOLD_FOLDER, IS_SLOW
from tests.twin import Twin, block_lengths, initial_noise

ROOT = Path(__file__).resolve().parents[2]
SMALL = Preset(
    height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2, negative_prompt="grey, blurred", schedule="paper"
)
REQUEST = GenerationRequest(prompt="a red circle bounces", latents_num=12, seed=7)
FAULTS = "tests.distributed.hooks:faults"
WAIT_S = 300


def open_engine(folder: Path, outputs: Path, **options: Any) -> Engine:
    return Engine(folder, **{"preset": SMALL, "device": "cpu", "threads": 1, "outputs": outputs, **options})


def latents_of(engine: Engine, request: GenerationRequest = REQUEST, **options: Any) -> torch.Tensor:
    found = engine.submit(request, return_latents=True, **options).result(WAIT_S).latents
    assert found is not None
    return found


def count_frames(video: str | Path) -> int:
    """Frames of 32x32 that come out of a decoder, one by one; fails if the decoder complains."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert not done.stderr, done.stderr
    assert len(done.stdout) % (32 * 32) == 0
    return len(done.stdout) // (32 * 32)


def wait_for(job: Job, *kinds: type, timeout_s: float = WAIT_S) -> Any:
    """The first event of one of `kinds`."""
    for event in job.events(timeout_s):
        if isinstance(event, kinds):
            return event
        assert not isinstance(event, Failed), event
    raise AssertionError("the job ended without it")


def codec_pid(engine: Engine) -> int:
    return int(engine.workers["codec"]["pid"])


# One rank: numbers, files, refusals


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def solo(tiny: Path, outputs: Path) -> Iterator[Engine]:
    with open_engine(tiny, outputs, max_queue=70) as engine:
        yield engine


@pytest.fixture(scope="module")
def first_bits(solo: Engine) -> torch.Tensor:
    """What one rank makes of REQUEST as its first job (this fixture is asked for by the first test)."""
    return latents_of(solo)


def test_first_and_second_job(solo: Engine, first_bits: torch.Tensor) -> None:
    other = latents_of(solo, REQUEST.model_copy(update={"seed": 8, "latents_num": 20, "guidance_scale": 1.0}))
    assert other.shape[2] == 20
    assert torch.equal(latents_of(solo), first_bits)
    assert first_bits.shape == (1, 4, 12, 4, 4)
    assert first_bits.dtype == torch.float32


def test_a_cut_prompt_is_told(solo: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    prompt = "b " * 255 + "c dog secret"
    job = solo.submit(REQUEST.model_copy(update={"prompt": prompt, "latents_num": 1}))
    follow(solo, job)
    job.result(timeout=120)
    reported = "the prompt is longer than the model's 512 tokens: “dog” and what follows it are left out"
    notices = [event.notice for event in job.folder.events() if isinstance(event, Started)]
    assert notices == ["", reported]
    out = capfd.readouterr()
    assert f"note: {reported}" in out.err and "secret" not in out.err
    history = job.view().history
    assert history.started is not None and history.started.notice == reported and history.num_runs == 1


def test_many_blocks_equal_the_twin(solo: Engine, tiny: Path, first_bits: torch.Tensor) -> None:
    kept = EmbeddingCache(cache_folder() / "text")  # what the codec made of them: this process may round differently by now
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32, cache=kept)
    texts = [[encoder.encode(REQUEST.prompt), encoder.encode(SMALL.negative_prompt)]]
    assert not encoder.is_loaded
    case = {"latents_num": 12, "num_per_block": 3, "num_cat": 2, "steps": 4, "texts": texts, "seed": 7}
    expected = torch.cat(list(Twin(tiny).run(**case).values()), dim=2)
    assert (first_bits - expected).abs().max() <= 1e-5
    given = latents_of(solo, REQUEST.model_copy(update={"prompt": "ignored"}), prompt_embeds=texts[0][0],
                       negative_prompt_embeds=texts[0][1])  # fmt: skip
    assert torch.equal(given, first_bits), "supplied embeddings and noise count as they are"
    noise = initial_noise(block_lengths(12, 3, 2), 3, 2, (4, 4, 4), seed=7)
    assert torch.equal(latents_of(solo, REQUEST.model_copy(update={"seed": 99}), latents=noise), first_bits)


def test_one_block_from_a_prompt_equals_the_pipeline(solo: Engine, tiny: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for width, prompt in ((32, "A cat — “quoted”, naïve &amp; 猫\n walks"), (64, "x")):
        request = GenerationRequest(
            prompt=prompt, latents_num=5, seed=3, width=width, guidance_scale=4.0, num_inference_steps=6
        )
        (noise,) = initial_noise([5], 3, 2, (4, 4, width // 8), seed=3)
        arguments: dict[str, Any] = dict(
            prompt=prompt, negative_prompt=SMALL.negative_prompt, height=32, width=width, num_frames=17,
            num_inference_steps=6, guidance_scale=4.0,
        )  # fmt: skip
        expected = pipeline(latents=noise.clone(), output_type="latent", **arguments).frames
        job = solo.submit(request, return_latents=True, export_images=True)
        result = job.result(WAIT_S)
        assert result.latents is not None
        assert (result.latents - expected).abs().max() <= 1e-5
        shown = np.asarray(pipeline(latents=noise.clone(), output_type="np", **arguments).frames)[0]
        from PIL import Image

        pictures = sorted((job.folder.path / "frames").glob("*.png"))
        assert len(pictures) == 17
        found = np.stack([np.asarray(Image.open(picture)) for picture in pictures])
        assert np.abs(found.astype(int) - (shown * 255).round().astype(int)).max() <= 1


def test_events_and_files(solo: Engine) -> None:
    job = solo.submit(REQUEST)
    events = list(job.events(WAIT_S))
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Queued | Started)
    assert [type(event) for event in events].count(Finished) == 1 and isinstance(events[-1], Finished)
    ready = [event for event in events if isinstance(event, BlockReady)]
    assert [event.block for event in ready] == [0, 1, 2, 3]
    assert [event.first_frame for event in ready] == [0, 17, 29, 41]
    for event in ready:
        assert count_frames(event.path) == event.num_frames
        assert event.duration_s == pytest.approx(event.num_frames / 16)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress and progress[-1].items_done == progress[-1].num_items == 16
    assert events[-1].num_frames == count_frames(events[-1].path) == 45
    assert {"text_s", "denoise_s", "decode_s", "encode_s", "total_s", "first_frames_s"} <= set(events[-1].timings)
    record = json.loads((job.folder.path / "request.json").read_text())
    assert record["request"]["latents_num"] == 12 and record["text_encoder"] == solo.text_encoder == "keep"
    stored = [json.loads(line)["event"] for line in (job.folder.path / "events.jsonl").read_text().splitlines()]
    assert stored[0] == "Queued" and stored[-1] == "Finished" and "Progress" not in stored
    assert not list(job.folder.path.glob(".*.part"))


def test_frames_promised_are_in_the_mp4(solo: Engine) -> None:
    """latents_num 1 to 60: decode the file and count."""
    jobs = {
        latents_num: solo.submit(
            GenerationRequest(
                prompt="count", latents_num=latents_num, num_inference_steps=1, num_per_block=7, num_cat=latents_num % 8,
                guidance_scale=1.0, seed=latents_num,
            )
        )
        for latents_num in range(1, 61)
    }  # fmt: skip
    for latents_num, job in jobs.items():
        result = job.result(WAIT_S)
        promised = next(event for event in job.events() if isinstance(event, Started)).num_frames
        assert promised == result.num_frames == (latents_num - 1) * 4 + 1
        assert count_frames(result.path) == promised, latents_num


def test_ten_jobs_leave_memory_where_it_was(solo: Engine) -> None:
    pids = [solo.workers["rank 0"]["pid"], codec_pid(solo)]

    def resident() -> list[float]:
        return [psutil.Process(pid).memory_info().rss / 1e6 for pid in pids]

    for _ in range(3):
        latents_of(solo)
    before = resident()
    for _ in range(10):
        latents_of(solo)
    growth = [after - start for after, start in zip(resident(), before, strict=True)]
    assert max(growth) < 15, f"megabytes gained: {growth}"


BAD_TENSORS: list[dict[str, Any]] = [
    {"latents": [torch.zeros(1, 4, 12, 4, 4)]},  # one tensor for all blocks
    {"latents": []},
    {"latents": [torch.zeros(1, 4, n, 4, 4) for n in (5, 3, 3)]},
    {"latents": [torch.zeros(1, 4, n, 4, 6) for n in (5, 3, 3, 1)]},
    {"latents": [torch.full((1, 4, n, 4, 4), float("nan")) for n in (5, 3, 3, 1)]},
    {"latents": torch.zeros(1, 4, 12, 4, 4)},
    {"latents": "noise"},
    {"prompt_embeds": torch.zeros(1, 5, 31)},
    {"prompt_embeds": torch.zeros(5, 32)},
    {"prompt_embeds": torch.zeros(2, 5, 32)},
    {"prompt_embeds": torch.zeros(1, 0, 32)},
    {"prompt_embeds": torch.full((1, 5, 32), float("inf"))},
    {"negative_prompt_embeds": torch.zeros(1, 5, 31)},
    {"prompt_embeds": "a cat"},
]


def test_bad_requests_queue_nothing(solo: Engine, outputs: Path) -> None:
    before = set(outputs.iterdir())
    for bad in BAD_TENSORS:
        with pytest.raises(RequestError, match=r"latents|prompt_embeds") as caught:
            solo.submit(REQUEST, **bad)
        assert "\n" not in str(caught.value), bad
    for values in (
        {"num_cat": 4}, {"latents_num": 10_000}, {"num_inference_steps": 900}, {"num_per_block": 500},
        {"width": 8192, "height": 8208},
    ):  # fmt: skip
        with pytest.raises(RequestError):
            solo.submit(GenerationRequest(**{"prompt": "x", "latents_num": 5, **values}))
    for job_id in ("../../etc", "ABCDEF12", "", "a" * 40, "abc\n123", 5):
        with pytest.raises(RequestError):
            solo.submit(REQUEST, job_id=job_id)  # type: ignore[arg-type]
    assert solo.jobs() == []
    assert set(outputs.iterdir()) == before
    taken = next(iter(before)).name
    with pytest.raises((RequestError, OutputError)):
        solo.submit(REQUEST, job_id=taken)


def test_outputs_that_cannot_be_written(solo: Engine, tiny: Path, tmp_path: Path, first_bits: torch.Tensor) -> None:
    (tmp_path / "file").write_text("not a folder")
    real, solo.outputs = solo.outputs, tmp_path / "file"
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            solo.submit(REQUEST)
    finally:
        solo.outputs = real
    assert solo.jobs() == []
    # In mid-run: the place of the second segment is taken by a folder.
    codec = codec_pid(solo)
    blocker = solo.submit(REQUEST)
    job = solo.submit(REQUEST)
    (job.folder.path / "block_0001.ts").mkdir()
    with pytest.raises(OutputError, match="block_0001"):
        job.result(WAIT_S)
    final = list(job.events())[-1]
    assert isinstance(final, Failed) and final.kind == "OutputError"
    assert final.path is not None and count_frames(final.path) == final.num_frames == 17
    assert blocker.result(WAIT_S).num_frames == 45
    # At the start: no folder for the pictures.
    blocker = solo.submit(REQUEST)
    job = solo.submit(REQUEST, export_images=True)
    (job.folder.path / "frames").write_text("in the way")
    with pytest.raises(OutputError, match="frames"):
        job.result(WAIT_S)
    assert torch.equal(latents_of(solo), first_bits)
    assert codec_pid(solo) == codec, "an unwritable folder took the codec down"


# Two ranks and faults


@pytest.fixture(scope="module")
def duo(tiny: Path, outputs: Path) -> Iterator[Engine]:
    with open_engine(tiny, outputs, ranks=2, worker_hook=FAULTS, max_queue=3) as engine:
        yield engine


def slow(latents_num: int = 40) -> GenerationRequest:
    return GenerationRequest(prompt="slow", latents_num=latents_num, num_inference_steps=IS_SLOW, seed=1)


def test_two_ranks_have_the_bits_of_one(duo: Engine, first_bits: torch.Tensor) -> None:
    assert torch.equal(latents_of(duo), first_bits)
    assert torch.equal(latents_of(duo), first_bits)


def test_a_rank_holds_its_own_layers_only(duo: Engine, tiny: Path) -> None:
    owners = transformer_owners(Checkpoint(tiny).config("transformer"))
    expected = [{key for key, owner in owners.items() if owner in ids} for ids in ((-1, 0, 1), (2, 3, 4))]
    for rank in (0, 1):
        assert set(duo.workers[f"rank {rank}"]["parameters"]) == expected[rank]


def test_cancel_while_queued(duo: Engine, first_bits: torch.Tensor) -> None:
    first, second, third = duo.submit(slow(10)), duo.submit(REQUEST), duo.submit(REQUEST, return_latents=True)
    second.cancel()
    with pytest.raises(JobCancelled) as caught:
        second.result(5)
    assert caught.value.path is None
    assert second.state == "cancelled"
    positions = [event.position for event in third.events(WAIT_S) if isinstance(event, Queued)]
    assert positions == sorted(positions, reverse=True), "the queue moved up"
    assert torch.equal(third.result(WAIT_S).latents, first_bits)  # type: ignore[arg-type]
    assert first.result(WAIT_S).num_frames == 37
    first.cancel()  # after the end: nothing
    assert first.state == "finished"


def test_queue_full(duo: Engine, outputs: Path) -> None:
    running = duo.submit(slow())
    wait_for(running, Started)
    waiting = [duo.submit(REQUEST) for _ in range(3)]
    before = set(outputs.iterdir())
    with pytest.raises(QueueFull, match="3 jobs"):
        duo.submit(REQUEST)
    assert set(outputs.iterdir()) == before
    for job in (*waiting, running):
        job.cancel()
    for job in (*waiting, running):
        with pytest.raises(JobCancelled):
            job.result(WAIT_S)


@pytest.mark.parametrize("at", [Started, Progress, BlockReady])
def test_cancel_while_running(duo: Engine, first_bits: torch.Tensor, at: type) -> None:
    job, follower = duo.submit(slow()), duo.submit(REQUEST, return_latents=True)
    wait_for(job, at)
    job.cancel()
    job.cancel()
    with pytest.raises(JobCancelled) as caught:
        job.result(WAIT_S)
    final = list(job.events())[-1]
    assert isinstance(final, Cancelled)
    blocks = [event for event in job.events() if isinstance(event, BlockReady)]
    assert final.num_frames == sum(event.num_frames for event in blocks)
    assert caught.value.path == final.path
    if at is BlockReady:
        assert blocks
    if blocks:
        assert final.path is not None and count_frames(final.path) == final.num_frames
    else:
        assert final.path is None
    assert torch.equal(follower.result(WAIT_S).latents, first_bits)  # type: ignore[arg-type]


def check_recovery(engine: Engine, job: Job, follower: Job, first_bits: torch.Tensor, error: type, says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        job.result(WAIT_S)
    assert "\n" not in str(caught.value)
    final = list(job.events())[-1]
    assert isinstance(final, Failed)
    if final.path is not None:
        assert count_frames(final.path) == final.num_frames
    assert torch.equal(follower.result(WAIT_S).latents, first_bits)  # type: ignore[arg-type]
    assert engine.state == "ready"


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "codec"])
def test_a_killed_worker(duo: Engine, first_bits: torch.Tensor, victim: str) -> None:
    duo.wait_ready(WAIT_S)
    job, follower = duo.submit(slow()), duo.submit(REQUEST, return_latents=True)
    ready = wait_for(job, BlockReady)
    os.kill(int(duo.workers[victim]["pid"]), signal.SIGKILL)
    check_recovery(duo, job, follower, first_bits, WorkerDied, f"{victim} was killed by SIGKILL")
    final = list(job.events())[-1]
    assert isinstance(final, Failed) and final.num_frames >= ready.num_frames, "the finished blocks were lost"


def test_a_killed_worker_while_idle(duo: Engine, first_bits: torch.Tensor) -> None:
    os.kill(int(duo.workers["rank 1"]["pid"]), signal.SIGKILL)
    assert wait_until(lambda: duo.state != "ready")
    assert torch.equal(latents_of(duo), first_bits)


def test_a_stopped_worker(duo: Engine, first_bits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    duo.wait_ready(WAIT_S)
    monkeypatch.setattr(pulse, "SILENCE_S", 10.0)  # beats of a loaded machine may be seconds apart
    job, follower = duo.submit(slow()), duo.submit(REQUEST, return_latents=True)
    wait_for(job, Progress)
    os.kill(int(duo.workers["rank 1"]["pid"]), signal.SIGSTOP)
    list(job.events())  # until it has failed
    monkeypatch.undo()  # the workers that come back may take longer than that
    check_recovery(duo, job, follower, first_bits, WorkerDied, "rank 1 has not answered for 10 s")


def test_a_hung_codec(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    """It lives and sends heartbeats, and with one rank nobody waits for it."""
    texts = {name: torch.zeros(1, 5, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}  # nothing to load or encode
    with open_engine(tiny, tmp_path, worker_hook="tests.distributed.hooks:hangs", timeout_s=60.0) as engine:
        hung = engine.submit(REQUEST.model_copy(update={"width": 48}), **texts)
        with pytest.raises(WorkerDied, match=r"codec has been at one step for 60 s \(decoding block 0\)"):
            hung.result(WAIT_S)
        assert engine.submit(REQUEST, **texts).result(WAIT_S).num_frames == 45


def test_an_error_in_a_worker(duo: Engine, first_bits: torch.Tensor) -> None:
    duo.wait_ready(WAIT_S)
    request = GenerationRequest(prompt="fails", latents_num=20, num_inference_steps=FAILS_ON_RANK_1, seed=1)
    job, follower = duo.submit(request), duo.submit(REQUEST, return_latents=True)
    check_recovery(duo, job, follower, first_bits, WorkerFailed, "^rank 1 failed: RuntimeError: the roof is on fire$")


# More ranks, other kinds of checkpoint


def test_three_ranks_and_an_exception(tiny: Path, tmp_path: Path, first_bits: torch.Tensor, leaves_nothing: None) -> None:
    """The bits on an uneven split; an exception in the caller's block ends what runs; a closed engine takes nothing."""
    options: dict[str, Any] = {"ranks": 3, "layer_split": (2, 1, 1), "worker_hook": FAULTS}
    with pytest.raises(ZeroDivisionError), open_engine(tiny, tmp_path, **options) as engine:
        assert torch.equal(latents_of(engine), first_bits)
        running, waiting = engine.submit(slow()), engine.submit(REQUEST)
        wait_for(running, Progress)
        _ = 1 / 0
    for job in (running, waiting):
        with pytest.raises(EngineError, match="closed"):
            job.result(1)
    assert engine.state == "closed"
    with pytest.raises(EngineError, match="closed"):
        engine.submit(REQUEST)
    engine.close()
    with pytest.raises(EngineError, match="before"):
        engine.start()


def test_four_ranks(tiny: Path, tmp_path: Path, first_bits: torch.Tensor, leaves_nothing: None) -> None:
    with open_engine(tiny, tmp_path, ranks=4) as engine:
        assert torch.equal(latents_of(engine), first_bits)
        assert latents_of(engine, REQUEST.model_copy(update={"latents_num": 1})).shape[2] == 1


def test_two_experts_in_bfloat16(tiny_two: Path, tmp_path: Path, leaves_nothing: None) -> None:
    with open_engine(tiny_two, tmp_path, ranks=2, dtype="bf16") as engine:
        found = latents_of(engine, REQUEST.model_copy(update={"num_inference_steps": 8}))
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        parameters = [set(engine.workers[f"rank {rank}"]["parameters"]) for rank in (0, 1)]
        assert not parameters[0] & parameters[1]
    encoder = TextEncoder(Checkpoint(tiny_two), device="cpu", dtype=torch.bfloat16)
    texts = [[encoder.encode(REQUEST.prompt).float(), encoder.encode(SMALL.negative_prompt).float()]]
    expected = Twin(tiny_two).run(
        latents_num=12, num_per_block=3, num_cat=2, steps=8, texts=texts, seed=7, boundary_ratio=0.875
    )  # fmt: skip
    difference = (found - torch.cat(list(expected.values()), dim=2)).abs()
    assert difference.mean() < 0.03 and difference.max() < 0.6


def test_resident_memory_falls_with_the_number_of_ranks(tmp_path: Path, leaves_nothing: None) -> None:
    """On a checkpoint of 250 MB: a rank of two holds about half of the weights."""
    from dualparal.model.tiny import write_tiny_checkpoint

    folder = write_tiny_checkpoint(
        tmp_path / "large", num_layers=6, num_heads=8, head_dim=80, ffn_dim=3000, max_shard_size="60MB", seed=4
    )
    resident: dict[int, float] = {}
    weights: dict[int, float] = {}
    for ranks in (1, 2):
        with open_engine(folder, tmp_path / "outputs", ranks=ranks) as engine:
            about = [engine.workers[f"rank {rank}"] for rank in range(ranks)]
            resident[ranks] = max(psutil.Process(worker["pid"]).memory_info().rss / 1e6 for worker in about)
            weights[ranks] = sum(worker["weight_bytes"] / 1e6 for worker in about)
    assert 150 < weights[1] == pytest.approx(weights[2])
    assert resident[1] - resident[2] > 0.35 * weights[1], f"{resident} MB resident, {weights} MB of weights"


def test_a_model_that_breaks_while_loading(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    """What the front end cannot see: a tensor of the VAE is missing. One clear error, no restart without end."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vae lacks decoder\.conv_out\.bias"):
        open_engine(folder, tmp_path / "outputs").start()


# Scripts: engines opened by programs of their own

SCRIPT = """
    import sys, time
    from dualparal import Engine, GenerationRequest
    from dualparal.presets import Preset

    preset = Preset(height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2)
    print("begin", flush=True)
    with Engine({folder!r}, preset=preset, ranks=2, device="cpu", threads=1, outputs={outputs!r}) as engine:
        result = engine.submit(GenerationRequest(prompt="x", latents_num=4, seed=7)).result(100)
        assert "torch" not in sys.modules and "diffusers" not in sys.modules, "the front end imported torch"
        print("frames", result.num_frames, flush=True)
        {then}
"""


def script(folder: Path, outputs: Path, then: str) -> list[str]:
    return [
        sys.executable,
        "-W",
        "error",
        "-c",
        textwrap.dedent(SCRIPT.format(folder=str(folder), outputs=str(outputs), then=then)),
    ]


@contextlib.contextmanager
def hears_control_c() -> Iterator[None]:
    """A program started within it does not ignore SIGINT, as a shell's background jobs do, and what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_script(tmp_path: Path, tiny: Path, then: str, as_file: bool = False) -> subprocess.Popen[str]:
    command = script(tiny, tmp_path / "outputs", then)
    if as_file:
        (tmp_path / "unguarded.py").write_text(command[-1])
        command[-2:] = [str(tmp_path / "unguarded.py")]
    with hears_control_c():
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All descendants, Python's resource tracker too."""
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


def test_an_unguarded_script_and_an_exception_in_it(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    process = start_script(tmp_path, tiny, 'raise KeyError("mine")', as_file=True)
    out, err = process.communicate(timeout=WAIT_S)
    assert out.splitlines() == ["begin", "frames 13"], (out, err)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == "KeyError: 'mine'"
    assert "leaked" not in err and "Warning" not in err, err


def test_control_c(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    then = """job = engine.submit(GenerationRequest(prompt="y", latents_num=100, num_inference_steps=150, seed=7))
        print(next(type(event).__name__ for event in job.events(300) if hasattr(event, "items_done")), flush=True)
        job.result(600)"""
    process = start_script(tmp_path, tiny, then)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    assert process.stdout.readline() == "frames 13\n"
    assert process.stdout.readline() == "Progress\n"
    children = family(process)
    assert len(children) >= 3
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (1, -signal.SIGINT)
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt", err
    assert err.count("Traceback") == 1 and "leaked" not in err, err
    assert wait_until(lambda: are_gone(children)), children  # Python's resource tracker is a little later


@pytest.mark.parametrize("at", ["running", "starting"])
def test_kill_9_of_the_front_end_leaves_no_worker(tiny: Path, tmp_path: Path, at: str, leaves_nothing: None) -> None:
    process = start_script(tmp_path, tiny, "time.sleep(100)")
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    if at == "running":
        assert process.stdout.readline() == "frames 13\n"
    else:
        assert wait_until(lambda: len(family(process)) >= 3)
    children = family(process)
    process.kill()
    process.communicate()
    assert wait_until(lambda: are_gone(children), 30), children


def test_a_script_that_never_closes_its_engine(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    code = textwrap.dedent(f"""
        from dualparal import Engine
        engine = Engine({str(tiny)!r}, device="cpu", outputs={str(tmp_path)!r}).start()
        print("ready")
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    assert not done.stderr


def test_workers_import_no_more_than_they_use(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT, transformers and torch's compiler take longer to import than the rest; a new prompt needs transformers, a known one
    does not."""
    monkeypatch.setenv(HOLD_FOLDER, str(tmp_path))
    workers = {name: tmp_path / f"imports of {name}" for name in ("codec", "0", "1")}
    request = REQUEST.model_copy(update={"prompt": "asked for here alone"})
    for is_new in (True, False):
        with open_engine(tiny, tmp_path / "outputs", ranks=2, worker_hook="tests.distributed.hooks:tells_imports") as engine:
            latents_of(engine, request)
        first = {name: path.read_text().splitlines()[0] for name, path in workers.items()}
        assert ("'transformers'" in first.pop("codec")) is is_new
        assert set(first.values()) == {"[]"}
        for path in workers.values():
            path.unlink()
