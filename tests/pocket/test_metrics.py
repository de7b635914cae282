"""The metrics see what they claim to see: ground truth gives full marks, and each kind of broken video loses exactly the
mark it should."""

from __future__ import annotations

import numpy as np
import pytest

from dualparal.pocket.judge import block_borders, diversity, drift, jumps, repetition
from dualparal.pocket.metrics import adherence, classify_motion, read_frames, velocities
from dualparal.pocket.world import MOTIONS, SIDE_PX, Prompt, Scene, held_out_prompts, random_scene

PROMPT = Prompt(color="red", shape="circle", motion="moving right", background="navy")


def scene(**changes: str) -> Scene:
    attributes = {name: getattr(PROMPT, name) for name in ("color", "shape", "motion", "background")} | changes
    return Scene(prompt=Prompt(**attributes), x_px=20, y_px=30, phase=0.3, radius_px=11)


def mean_ratio(video: np.ndarray, borders: list[int], name: str) -> float:
    at_borders, inside = jumps(read_frames(video), borders)[name]
    return float(at_borders.mean() / (inside.mean() + 1e-3))


@pytest.mark.parametrize("prompt", held_out_prompts()[::4], ids=lambda p: p.caption)
def test_truth_gets_full_marks(prompt: Prompt) -> None:
    truth = random_scene(prompt, np.random.default_rng(1))
    video = truth.render(97)
    reading = read_frames(video)
    offset = (reading.center_px - truth.centers(97) + SIDE_PX / 2) % SIDE_PX - SIDE_PX / 2
    assert np.abs(offset).max() < 0.25
    assert reading.residual.max() < 0.01
    assert set(adherence(reading, prompt).values()) == {1.0}
    assert repetition(video, prompt) < 0.2
    found = drift(reading, prompt)
    assert found["palette_first"] < 0.02
    assert found["palette_last"] < 0.02
    assert found["size_ratio"] == pytest.approx(1, abs=0.02)


def test_eight_bit_and_enlarged_videos_read_the_same() -> None:
    video = scene().render(49)
    large = np.rint(video.repeat(2, axis=1).repeat(2, axis=2) * 255).astype(np.uint8)
    a, b = read_frames(video), read_frames(large)
    assert a.shape == b.shape
    assert np.abs(a.center_px - b.center_px).max() < 0.1
    assert np.abs(a.area_px / b.area_px - 1).max() < 0.02


@pytest.mark.parametrize("noise", [0.02, 0.06])
def test_reading_survives_noise(noise: float) -> None:
    video = np.clip(scene().render(49) + np.random.default_rng(0).normal(0, noise, (49, 64, 64, 3)), 0, 1)
    assert min(adherence(read_frames(video), PROMPT).values()) > 0.9


@pytest.mark.parametrize(
    ("attribute", "value"), [("color", "orange"), ("shape", "square"), ("background", "black"), ("motion", "moving left")]
)
def test_one_wrong_attribute_costs_that_mark_only(attribute: str, value: str) -> None:
    marks = adherence(read_frames(scene(**{attribute: value}).render(65)), PROMPT)
    assert marks[attribute] == 0
    assert marks["all"] == 0
    assert all(marks[name] == 1 for name in ("color", "shape", "background", "motion") if name != attribute)


@pytest.mark.parametrize("asked", MOTIONS)
def test_motions_are_told_apart(asked: str) -> None:
    for start in (0, 5, 11, 23):
        track = scene(motion=asked).centers(100)[start : start + 48]
        assert classify_motion(track) == asked


def test_still_jumping_and_random_objects_have_no_motion() -> None:
    rng = np.random.default_rng(0)
    assert classify_motion(np.full((48, 2), 30.0)) == ""
    assert classify_motion(rng.uniform(0, SIDE_PX, (48, 2))) == ""
    assert classify_motion((30 + rng.normal(0, 2, (48, 2)).cumsum(axis=0)) % SIDE_PX) == ""
    there_and_back = np.concatenate([scene().centers(24), scene().centers(24)[::-1]])
    assert classify_motion(there_and_back) == ""


def test_an_empty_picture_has_no_object() -> None:
    reading = read_frames(np.full((10, 64, 64, 3), 0.5))
    assert not reading.is_seen.any()
    assert reading.background == ["grey"] * 10
    marks = adherence(reading, Prompt(color="red", shape="circle", motion="bouncing", background="grey"))
    assert marks == {"color": 0, "shape": 0, "background": 1, "motion": 0, "all": 0}


def test_two_objects_leave_a_residual() -> None:
    both = np.maximum(scene().render(20), scene(color="green", motion="bouncing").render(20))
    assert read_frames(both).residual.mean() > 3 * read_frames(scene().render(20)).residual.mean() + 0.005


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_jump_at_block_borders_is_seen_and_truth_has_none(motion: str) -> None:
    borders = block_borders([8, 6, 6, 6])
    truth = scene(motion=motion).render(101)
    broken = truth.copy()
    for border in borders:
        broken[border:] = np.roll(broken[border:], 5, axis=2)
    assert borders == [29, 53, 77]
    assert mean_ratio(truth, borders, "position") < 1.7  # a bounce off the floor may fall on a border
    assert mean_ratio(broken, borders, "position") > 3


def test_a_turn_a_growth_and_a_new_colour_at_block_borders_are_seen() -> None:
    borders = [29, 53]
    turned = np.concatenate([scene().render(29), scene(motion="moving up").render(24), scene().render(24)])
    assert mean_ratio(turned, borders, "velocity") > 10
    grown = scene().render(77)
    grown[29:] = Scene(prompt=PROMPT, x_px=20, y_px=30, phase=0, radius_px=12.5).render(77)[29:]
    assert mean_ratio(grown, [29], "size") > 10
    recolored = scene().render(77)
    recolored[29:] = scene(color="orange").render(77)[29:]
    assert mean_ratio(recolored, [29], "color") > 10


def test_fading_colours_are_drift() -> None:
    video = scene().render(97)
    fade = np.linspace(0, 0.5, 97)[:, None, None, None]
    found = drift(read_frames(video * (1 - fade) + 0.5 * fade), PROMPT)
    assert found["palette_last"] > 5 * found["palette_first"]


def test_frozen_and_looping_videos_repeat() -> None:
    frozen = np.repeat(scene().render(1), 97, axis=0)
    assert repetition(frozen, PROMPT) == 1
    looped = np.concatenate([scene().render(20)] * 5)
    assert repetition(looped, PROMPT) > 0.9


def test_copies_are_not_diverse() -> None:
    rng = np.random.default_rng(0)
    different = diversity([read_frames(random_scene(PROMPT, rng).render(9)) for _ in range(5)])
    same = diversity([read_frames(scene().render(9))] * 5)
    assert same == pytest.approx({"place_px": 0, "size": 0}, abs=1e-6)
    assert different["place_px"] > 8
    assert different["size"] > 0.05


def test_velocity_takes_the_short_way_round() -> None:
    assert np.allclose(velocities(np.asarray([[63.0, 1.0], [1.0, 63.0]])), [[2.0, -2.0]])
