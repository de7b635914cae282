"""`--baseline wan`: diffusers' pipeline in our folder layout; one block of the engine's equals it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from dualparal import Engine, GenerationRequest
from dualparal.baseline import initial_noise, run_baseline
from dualparal.cli import main
from dualparal.core.rules import plan_of
from dualparal.events import BlockReady, Finished, Started
from dualparal.media.metadata import read_settings
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.runtime.journal import JobFolder, find_job
from tests.local_ring import denoise_in_threads
from tests.texts import joined

ASKED: dict[str, Any] = dict(
    prompt="a red circle", negative_prompt="blue", height=32, width=48, num_inference_steps=3, guidance_scale=4.0, seed=7,
    num_per_block=4, num_cat=2, flow_shift=5.0,
)  # fmt: skip


def job_folder(model: Path, outputs: Path, **values: Any) -> JobFolder:
    request = Engine(str(model), outputs=outputs).resolve(GenerationRequest(**{**ASKED, **values}))
    return JobFolder.create(outputs, "abcdef", request, model=str(model), dtype="float32", threads=1)


def test_one_block_is_the_baseline(tiny: Path, tmp_path: Path) -> None:
    folder = job_folder(tiny, tmp_path, latents_num=5)
    latents = run_baseline(folder, device="cpu")
    encoder = TextEncoder(Checkpoint(tiny), device="cpu", dtype=torch.float32)
    request = folder.request()
    found = joined(
        denoise_in_threads(
            tiny, latents_num=5, num_per_block=4, num_cat=2, steps=3, guidance=(4.0, 4.0), flow_shift=5.0, seed=7, size=(4, 6),
            texts=[[encoder.encode("a red circle"), encoder.encode("blue")]],
        )
    )  # fmt: skip
    assert (found - latents).abs().max() <= 1e-5
    kinds = [type(event) for event in folder.events()]
    assert kinds == [Started, BlockReady, Finished]
    final = folder.final_event()
    assert isinstance(final, Finished) and final.num_frames == 17 and final.timings["denoise_s"] > 0
    assert folder.video.is_file() and (folder.path / "block_0000.ts").is_file()
    assert read_settings(folder.video) == request


def test_two_experts_and_a_longer_video(tiny_two: Path, tmp_path: Path) -> None:
    folder = job_folder(tiny_two, tmp_path, latents_num=9, boundary_ratio=0.7, guidance_scale_2=2.0)
    request = folder.request()
    assert plan_of(request).num_blocks > 1
    latents = run_baseline(folder, device="cpu")
    pipeline = WanPipeline.from_pretrained(tiny_two, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(boundary_ratio=0.7)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=5.0)
    expected = pipeline(
        prompt="a red circle", negative_prompt="blue", height=32, width=48, num_frames=33, num_inference_steps=3,
        guidance_scale=4.0, guidance_scale_2=2.0, latents=initial_noise(request, 4, 8), output_type="latent",
    ).frames  # fmt: skip
    assert torch.equal(latents, expected)


def test_its_failure_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job_folder(tiny, tmp_path, latents_num=5)
    monkeypatch.setattr(WanPipeline, "__call__", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        run_baseline(folder, device="cpu")
    assert "OutOfMemory" in str(folder.final_event())


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
    parts = "dualparal.cli, dualparal.cli_baseline, dualparal.cli_plan, dualparal.runtime.engine"
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
