"""diffusers' form over fake workers: arguments, results, refusals; the page about it."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
from PIL import Image

from dualparal import DualParalPipeline, RequestError
from dualparal.media.metadata import describe
from dualparal.method.rules import plan_of
from dualparal.pipeline import _blocks_of, _seeds
from tests.fake_group import FOUR_BLOCKS, NUM_FRAMES, GroupLog

SIZE: dict[str, Any] = {name: value for name, value in FOUR_BLOCKS.items() if name != "latents_num"}


@pytest.fixture
def pipe(tmp_path: Path, tiny: Path, group_log: GroupLog) -> Iterator[DualParalPipeline]:
    options: dict[str, Any] = {"outputs": tmp_path / "outputs", "device": "cpu", "threads": 1}
    with DualParalPipeline.from_pretrained(tiny, ranks=1, torch_dtype=torch.float32, **options) as made:
        made.set_progress_bar_config(disable=True)
        yield made


def test_the_arguments_are_those_of_wan() -> None:
    theirs = list(inspect.signature(WanPipeline.__call__).parameters)
    ours = list(inspect.signature(DualParalPipeline.__call__).parameters)
    assert ours == [*theirs, "fields"]


def test_frames_of_one_video_and_a_file_of_them(pipe: DualParalPipeline, tmp_path: Path) -> None:
    output: Any = pipe("a kite", num_frames=NUM_FRAMES, generator=7, **SIZE)
    assert output.frames.shape == (1, NUM_FRAMES, 32, 32, 3) and output.frames.dtype == np.float32
    assert 0 <= output.frames.min() < output.frames.max() <= 1 and output.seeds == [7]
    assert describe(output.paths[0])["num_frames"] == NUM_FRAMES
    assert not (Path(output.paths[0]).parent / "frames").exists()
    export_to_video(output.frames[0], str(tmp_path / "x.mp4"), fps=16)
    assert describe(tmp_path / "x.mp4")["num_frames"] == NUM_FRAMES
    (same,) = pipe("a kite", num_frames=NUM_FRAMES, generator=torch.Generator().manual_seed(7), return_dict=False, **SIZE)
    assert np.array_equal(same, output.frames)


def test_other_forms(pipe: DualParalPipeline) -> None:
    (film,) = pipe("a kite", num_frames=5, output_type="pil", **SIZE).frames  # type: ignore[union-attr]
    assert len(film) == 5 and film[0].size == (32, 32)
    frames = pipe("a kite", num_frames=5, output_type="pt", **SIZE).frames  # type: ignore[union-attr]
    assert frames.shape == (1, 5, 3, 32, 32)


def test_several_videos(pipe: DualParalPipeline, group_log: GroupLog) -> None:
    output: Any = pipe(["a kite", "a boat"], "blue", num_frames=5, num_videos_per_prompt=2, generator=[1, 2, 3, 4], **SIZE)
    assert output.frames.shape == (4, 5, 32, 32, 3) and output.seeds == [1, 2, 3, 4]
    asked = [(run.request.prompt, run.request.negative_prompt, run.request.seed) for run in group_log.runs]
    assert asked == [("a kite", "blue", 1), ("a kite", "blue", 2), ("a boat", "blue", 3), ("a boat", "blue", 4)]
    output = pipe(["[1s] a kite", "[0.5s] a boat"], output_type="np", height=32, width=32, num_inference_steps=2)
    assert [len(video) for video in output.frames] == [17, 9]


def test_a_picture_to_begin_with(pipe: DualParalPipeline, tmp_path: Path, group_log: GroupLog) -> None:
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    red.save(tmp_path / "red.png")
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "num_per_block": 2, "num_cat": 1}
    for image in (red, tmp_path / "red.png", str(tmp_path / "red.png"), red.convert("CMYK")):
        output: Any = pipe("a kite", num_frames=9, image=image, **sizes)
        assert output.frames.shape == (1, 9, 32, 32, 3)
    kept = [Image.open(Path(run.folder) / "start.png").tobytes() for run in group_log.runs]
    assert kept[0] == kept[1] == kept[2] != b"" and len(kept) == 4
    assert not list(Path(tempfile.gettempdir()).glob("dualparal-*/image.png"))


def test_a_length_is_rounded_as_in_diffusers(pipe: DualParalPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe("a kite", num_frames=8, **SIZE).frames.shape[1] == 9  # type: ignore[union-attr]
    assert "num_frames=8 is not 4k + 1" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "prompt=None"), ({"prompt": []}, "prompt"), ({"prompt": "x", "output_type": "gif"}, "output_type='gif'"),
        ({"prompt": "x", "callback_on_step_end": print}, "events"), ({"prompt": "x", "height": 33}, "not divisible"),
        ({"prompt": ["x", "y"], "generator": [1]}, "1 entries for 2"), ({"prompt": "x", "generator": "7"}, "neither a seed"),
        ({"prompt": ["x", "y"], "negative_prompt": ["a"]}, "list of 2"), ({"prompt": "x", "max_sequence_length": 226}, "512"),
        ({"prompt": "x", "latents": torch.zeros(1, 4, 99, 4, 4)}, "one tensor"), ({"prompt": "x", "step": 1}, "not a field"),
        ({"prompt": "x", "num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"prompt": "x", "num_videos_per_prompt": -1}, "from 1"), ({"prompt": "x", "num_videos_per_prompt": 2.0}, "from 1"),
        ({"prompt": "x", "num_frames": float("nan")}, "num_frames"), ({"prompt": "x", "height": "big"}, "height"),
        ({"prompt": ["x", 7]}, "prompt"), ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale"),
        ({"prompt": "x", "generator": 2**70}, "seed"), ({"prompt": "x", "generator": True}, "neither a seed"),
        ({"prompt": "x", "image": np.zeros((4, 4, 3))}, "neither a"), ({"prompt": "x", "image": "/none.png"}, "no such"),
        ({"prompt": "x", "image": "a.png", "start_image": "a.png"}, "give"), ({"prompt": "x", "output_type": ["np"]}, "np"),
        ({"prompt": "x", "latents": "noise"}, "one tensor"), ({"prompt": "x", "prompt_embeds": [1]}, "tensors"),
        ({"prompt": "x", "takes": 2}, "num_videos_per_prompt"), ({"prompt": "x", "is_endless": True}, "pipe.engine"),
    ],
)  # fmt: skip
def test_refusals(pipe: DualParalPipeline, arguments: dict[str, Any], says: str, group_log: GroupLog) -> None:
    with pytest.raises(RequestError, match=says):
        pipe(**arguments)
    assert not group_log.runs


def test_noise_is_cut_where_the_blocks_are(pipe: DualParalPipeline) -> None:
    from dualparal import GenerationRequest

    settings = pipe.engine.resolve(
        GenerationRequest(prompt="x", latents_num=11, num_per_block=4, num_cat=2, height=32, width=32)
    )
    noise = torch.randn(1, 4, 11, 4, 4)
    blocks = _blocks_of(noise, settings)
    assert blocks is not None and [block.shape[2] for block in blocks] == list(plan_of(settings).lengths)
    assert torch.equal(torch.cat(blocks, dim=2), noise)


def test_seeds() -> None:
    assert _seeds(7, 3) == [7, 8, 9] and _seeds(None, 2) == [None, None]


def test_the_import_needs_no_torch() -> None:
    code = "import sys; from dualparal import DualParalPipeline; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
