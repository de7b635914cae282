"""`DualParalPipeline` with the real engine: one block is `WanPipeline`'s video; the lines of its page and the example run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from dualparal import DualParalPipeline
from dualparal.media.metadata import describe

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]
ASKED: dict[str, Any] = dict(prompt="a red circle", negative_prompt="blue", height=32, width=48, num_frames=17,
                             num_inference_steps=3, guidance_scale=4.0)  # fmt: skip


def test_one_block_is_wans_video(tiny: Path, tmp_path: Path) -> None:
    theirs = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, flow_shift=5.0)
    noise = torch.randn(1, theirs.transformer.config.in_channels, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"outputs": tmp_path, "device": "cpu", "threads": 1, "dtype": "float32"}
    with DualParalPipeline.from_pretrained(tiny, ranks=2, **options) as pipe:
        more = {"latents": noise, "flow_shift": 5.0, "num_per_block": 5, "num_cat": 0}
        found: Any = pipe(**ASKED, **more)
        latents: Any = pipe(**ASKED, **more, output_type="latent")
    expected = theirs(**ASKED, latents=noise.clone(), output_type="np").frames
    assert found.frames.shape == expected.shape == (1, 17, 32, 48, 3)
    assert np.abs(found.frames - expected).max() <= 0.51 / 255, "but for the rounding to bytes"
    assert (latents.frames - theirs(**ASKED, latents=noise.clone(), output_type="latent").frames).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_lines_of_the_page_and_the_example(tmp_path: Path) -> None:
    (page,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8"), re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DUALPARAL_OUTPUTS", None)
    for command in (["-c", page], [str(ROOT / "examples" / "diffusers_style.py"), "example.mp4"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "(1, 33, 64, 64, 3) [7]" in done.stdout or "65 frames, seed 7" in done.stdout
    assert describe(tmp_path / "circle.mp4")["num_frames"] == 33 and describe(tmp_path / "example.mp4")["num_frames"] == 65
