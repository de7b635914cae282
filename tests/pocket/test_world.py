"""The procedural world keeps the promises its captions make."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dualparal.pocket.world import (
    COLORS,
    MOTIONS,
    SHAPES,
    SIDE_PX,
    Prompt,
    all_prompts,
    held_out_prompts,
    random_scene,
    training_prompts,
)


def test_captions_read_back() -> None:
    for prompt in all_prompts():
        assert Prompt.parse(prompt.caption) == prompt
    assert Prompt.parse("A red circle, bouncing, on a navy background.").motion == "bouncing"


@pytest.mark.parametrize("caption", ["", "a red dog bouncing on a navy background", "a red circle on a navy background"])
def test_captions_of_other_worlds_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not in this world"):
        Prompt.parse(caption)


def test_held_out_prompts_are_apart_and_cover_every_word() -> None:
    held_out, training = held_out_prompts(), training_prompts()
    assert not set(held_out) & set(training)
    assert len(held_out) + len(training) == len(all_prompts())
    for prompts in (held_out, training):
        assert {p.color for p in prompts} == set(COLORS)
        assert {p.shape for p in prompts} == set(SHAPES)
        assert {p.motion for p in prompts} == set(MOTIONS)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_object_is_always_in_view(shape: str, motion: str) -> None:
    prompt = Prompt(color="red", shape=shape, motion=motion, background="black")
    for seed in range(5):
        video = random_scene(prompt, np.random.default_rng(seed)).render(60)
        assert video.shape == (60, SIDE_PX, SIDE_PX, 3)
        assert video.min() >= 0
        assert video.max() <= 1
        covered = (video[..., 0] > 0.5).mean(axis=(1, 2))
        assert covered.min() > 0.02


def test_same_seed_same_pixels() -> None:
    prompt = held_out_prompts()[0]
    a, b = (random_scene(prompt, np.random.default_rng(3)).render(5) for _ in range(2))
    assert np.array_equal(a, b)


def test_world_and_metrics_do_not_import_torch() -> None:
    code = (
        "import sys, dualparal.pocket.world, dualparal.pocket.metrics, dualparal.pocket.judge; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
