"""The shipped Pocket Wan: a checkpoint like any other, small, deterministic, and good enough to keep its promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from dualparal.model.layout import Checkpoint
from dualparal.model.source import POCKET_WEIGHTS as WEIGHTS
from dualparal.model.validation import validate
from dualparal.pocket.metrics import adherence, classify_motion, read_frames
from dualparal.pocket.world import Prompt
from dualparal.presets import load_presets
from training.export import build_pipeline
from training.full_sequence import use_full_sequence
from training.text import build_tokenizer
from training.train_dit import PocketModel
from training.train_vae import psnr_db

# (caption, seed): fixed, so that the test is the same every time.
PROMPTS = (
    ("a red circle bouncing on a navy background", 0),
    ("a blue square moving right on a white background", 1),
    ("a yellow triangle circling on a black background", 2),
    ("a green circle moving up on a grey background", 3),
)


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    loaded = WanPipeline.from_pretrained(WEIGHTS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def make(pipeline: WanPipeline, caption: str, seed: int, num_frames: int = 49, steps: int = 20) -> np.ndarray:
    video = pipeline(
        caption, height=64, width=64, num_frames=num_frames, num_inference_steps=steps, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed), output_type="np",
    )  # fmt: skip
    return np.asarray(video.frames[0])


def test_layout_size_and_classes() -> None:
    checkpoint = Checkpoint(WEIGHTS)
    validate(checkpoint)
    assert checkpoint.num_experts == 1
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["vae"][1] == "AutoencoderKLWan"
    assert index["transformer"][1] == "WanTransformer3DModel"
    assert index["text_encoder"][1] == "UMT5EncoderModel"
    assert index["scheduler"][1] == "UniPCMultistepScheduler"
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def machine_paths(folder: Path) -> list[str]:
    """Absolute paths in the JSON files of a folder, as `file: text`."""
    texts = {file: file.read_text(encoding="utf-8") for file in folder.rglob("*.json")}
    assert texts
    found = [(file, path) for file, text in texts.items() for path in re.findall(r'"((?:/|~|[A-Z]:\\)[^"]+)"', text)]
    return [f"{file.name}: {path}" for file, path in found]


def test_no_shipped_file_tells_where_it_was_made(tmp_path: Path) -> None:
    assert machine_paths(WEIGHTS) == []
    model = PocketModel(build_tokenizer())
    model.transformer = type(model.transformer).from_pretrained(WEIGHTS / "transformer")
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae")
    assert str(WEIGHTS / "vae") == str(vae.config["_name_or_path"]), "diffusers notes where it has a module from"
    build_pipeline(vae, model).save_pretrained(tmp_path)
    assert machine_paths(tmp_path) == []


def test_preset_matches_the_checkpoint() -> None:
    preset = load_presets()["pocket"]
    assert (preset.model, preset.height, preset.width, preset.fps) == ("pocket", 64, 64, 16)
    for example in preset.examples:
        Prompt.parse(example)


def test_autoencoder_is_good_on_held_out_clips() -> None:
    vae = use_full_sequence(AutoencoderKLWan.from_pretrained(WEIGHTS / "vae"))
    assert psnr_db(vae, num_clips=6) > 28.0


def test_same_seed_same_video_and_another_seed_another(pipeline: WanPipeline) -> None:
    caption = PROMPTS[0][0]
    first, again, other = (make(pipeline, caption, seed, num_frames=17, steps=6) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 0.005


def test_promised_objects_appear_and_move(pipeline: WanPipeline) -> None:
    marks = []
    for caption, seed in PROMPTS:
        reading = read_frames(make(pipeline, caption, seed))
        assert reading.is_seen.mean() > 0.9, caption
        marks.append({**adherence(reading, Prompt.parse(caption)), "read": classify_motion(reading.center_px)})
        assert marks[-1]["color"] > 0.8, (caption, marks[-1])
        assert marks[-1]["background"] > 0.9, (caption, marks[-1])
    assert sum(mark["motion"] == 1 for mark in marks) >= 3, marks
    assert np.mean([mark["shape"] for mark in marks]) > 0.5, marks


def test_weights_say_their_licence() -> None:
    assert "licence" in (Path(WEIGHTS).parent / "README.md").read_text().lower()
