"""`--baseline wan`: diffusers' pipeline in our folder layout; one block of the engine's equals it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from dualparal import Engine, GenerationRequest
from dualparal.cli.main import main
from dualparal.events import BlockReady, Progress, Started
from dualparal.jobs.folder import find_job
from dualparal.media.metadata import read_settings
from dualparal.messages import Denoised, Ready, RunJob, VideoClosed
from dualparal.method.rules import plan_of
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.request import SOLVERS, SolverName
from dualparal.ring.baseline_process import initial_noise, run_baseline
from tests.local_ring import denoise_in_threads
from tests.texts import joined

ASKED: dict[str, Any] = dict(
    prompt="a red circle", negative_prompt="blue", height=32, width=48, num_inference_steps=3, guidance_scale=4.0, seed=7,
    num_per_block=4, num_cat=2, flow_shift=5.0,
)  # fmt: skip


def run(model: Path, outputs: Path, **values: Any) -> tuple[torch.Tensor, list[Any], RunJob]:
    """What the worker makes of a request: (latents, its messages, its job)."""
    engine = Engine(str(model), outputs=outputs, device="cpu", threads=1)
    request = engine.resolve(GenerationRequest(**{**ASKED, **values}))
    reported: list[Any] = []
    uplink = SimpleNamespace(name="baseline", send=reported.append)
    job = RunJob("abcdef", request, str(outputs / "abcdef"), is_baseline=True)
    latents = run_baseline(job, engine._comparer.options, uplink)  # type: ignore[arg-type]
    return latents, reported, job


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_block_is_the_baseline(tiny: Path, tmp_path: Path, solver: SolverName) -> None:
    latents, reported, job = run(tiny, tmp_path, latents_num=5, solver=solver)
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    found = joined(
        denoise_in_threads(
            tiny, latents_num=5, num_per_block=4, num_cat=2, steps=3, guidance=(4.0, 4.0), flow_shift=5.0, seed=7, size=(4, 6),
            texts=[[encoder.encode("a red circle"), encoder.encode("blue")]], solver=solver,
        )
    )  # fmt: skip
    assert (found - latents).abs().max() <= 1e-5
    assert [type(message) for message in reported if not isinstance(message, Progress)] == [
        Started, Ready, BlockReady, Denoised, VideoClosed,
    ]  # fmt: skip
    assert [message.items_done for message in reported if isinstance(message, Progress)] == [1, 2, 3]
    closed, folder = reported[-1], Path(job.folder)
    assert closed.num_frames == 17 and closed.timings["denoise_s"] > 0
    assert closed.path == str(folder / "video.mp4") and (folder / "block_0000.ts").is_file()
    assert read_settings(folder / "video.mp4") == job.request.as_request()


def test_two_experts_and_a_longer_video(tiny_two: Path, tmp_path: Path) -> None:
    latents, _, job = run(tiny_two, tmp_path, latents_num=9, boundary_ratio=0.7, guidance_scale_2=2.0)
    request = job.request
    assert plan_of(request).num_blocks > 1
    pipeline = WanPipeline.from_pretrained(tiny_two, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(boundary_ratio=0.7)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=5.0)
    expected = pipeline(
        prompt="a red circle", negative_prompt="blue", height=32, width=48, num_frames=33, num_inference_steps=3,
        guidance_scale=4.0, guidance_scale_2=2.0, latents=initial_noise(request, 4, 8), output_type="latent",
    ).frames  # fmt: skip
    assert torch.equal(latents, expected)


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--baseline", "wan", "--model_id", str(tiny), "--outputs", str(tmp_path), "--job_id", "abcdef"]
    flags = ["--prompt", "x", "--height", "32", "--width", "32", "--latents_num", "2", "--sample_steps", "2", "--threads", "1"]
    assert main([*command, *flags, "--save-file", str(tmp_path / "x.mp4"), "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("job abcdef\n") and "5 frames" in out
    assert (tmp_path / "x.mp4").is_file() and find_job(tmp_path, "abcdef").record()["baseline"] == "wan"


def test_only_as_it_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--baseline", "wan", "--model_id", str(tiny), "--outputs", str(tmp_path), "--prompt", "x"]
    assert main([*command, "--compile"]) == 2
    assert "leave --lora, --attention, --compile and --quantization out" in capsys.readouterr().err


def test_the_front_end_stays_free_of_torch() -> None:
    parts = "dualparal.cli.main, dualparal.cli.generate, dualparal.cli.plan, dualparal.engine.engine"
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
