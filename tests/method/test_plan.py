"""Block plan: frames promised = frames delivered for every length, and every count that the other parts read from it."""

from __future__ import annotations

import pytest

from dualparal.method.plan import BlockPlan
from dualparal.request import frames_of_latents, latents_of_seconds
from tests.twin import block_lengths

SHAPES = [(n, c) for n in (1, 2, 3, 5, 8) for c in range(n + 1)]


@pytest.mark.parametrize(("num_per_block", "num_cat"), SHAPES)
def test_frames_promised_are_frames_delivered(num_per_block: int, num_cat: int) -> None:
    for latents_num in range(1, 201):
        plan = BlockPlan.of(latents_num, num_per_block, num_cat)
        assert list(plan.lengths) == block_lengths(latents_num, num_per_block, num_cat)
        assert plan.latents_num == sum(plan.lengths) == latents_num
        assert min(plan.lengths) >= 1
        shown = [frame for block in range(plan.num_blocks) for frame in plan.frames(block)]
        assert shown == list(range(frames_of_latents(latents_num))), latents_num
        assert [plan.start(block) for block in range(plan.num_blocks)] == [
            sum(plan.lengths[:block]) for block in range(plan.num_blocks)
        ]


@pytest.mark.parametrize(("num_per_block", "num_cat"), SHAPES)
def test_context(num_per_block: int, num_cat: int) -> None:
    for latents_num in range(1, 60):
        plan = BlockPlan.of(latents_num, num_per_block, num_cat)
        for block, length in enumerate(plan.lengths):
            is_last = block == plan.num_blocks - 1
            # Only the last block can be shorter than num_cat, so what comes before a block always has num_cat frames.
            assert plan.num_left(block) == (num_cat if block else 0)
            assert plan.num_kept(block) == min(num_cat, length)
            assert plan.num_right(block) == (0 if is_last else min(num_cat, plan.lengths[block + 1]))


@pytest.mark.parametrize(("num_per_block", "num_cat"), [(n, c) for n, c in SHAPES if c])
def test_a_picture_is_the_first_latent_and_no_block_has_it(num_per_block: int, num_cat: int) -> None:
    for latents_num in range(2, 60):
        plan = BlockPlan.of(latents_num, num_per_block, num_cat, picture=True)
        assert plan.latents_num + 1 == plan.num_shown + sum(plan.lengths) == latents_num
        assert list(plan.lengths) == block_lengths(latents_num - 1, num_per_block, 0), "no block is longer than others"
        assert [plan.num_left(block) for block in range(plan.num_blocks)] == [1] + [num_cat] * (plan.num_blocks - 1)
        shown = [frame for block in range(plan.num_blocks) for frame in plan.frames(block)]
        assert shown == list(range(plan.num_frames)) == list(range(frames_of_latents(latents_num)))
        assert len(plan.frames(0)) == plan.num_frames_of(0) == 4 * plan.lengths[0] + 1


def test_a_picture_before_shots() -> None:
    plan = BlockPlan.of_scenes([[8, 4], [6]], 3, 2, picture=True)
    assert plan.lengths == (3, 2, 2, 2, 2, 5, 1) and plan.cuts == (5,)
    shown = [frame for block in range(plan.num_blocks) for frame in plan.frames(block)]
    assert shown == list(range(plan.num_frames)) == list(range(frames_of_latents(12) + frames_of_latents(6)))
    assert [plan.num_left(block) for block in range(plan.num_blocks)] == [1, 2, 2, 2, 2, 0, 2]


@pytest.mark.parametrize("scenes", [[[1, 4]], [[1]]])
def test_a_picture_alone_is_no_film(scenes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no block plan"):
        BlockPlan.of_scenes(scenes, 3, 2, picture=True)
    with pytest.raises(ValueError, match="no block plan"):
        BlockPlan.of(1, 3, 2, picture=True)


def test_a_request_that_fits_in_the_first_block_is_one_block() -> None:
    assert BlockPlan.of(11, 8, 3).lengths == (11,)
    assert BlockPlan.of(12, 8, 3).lengths == (11, 1)
    assert BlockPlan.of(40, 8, 8).lengths == (16, 8, 8, 8)  # 157 frames, as the README of the authors promises


@pytest.mark.parametrize("values", [(0, 3, 1), (-1, 3, 1), (5, 0, 0), (5, 3, -1), (5, 3, 4)])
def test_impossible_plans(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no block plan"):
        BlockPlan.of(*values)


@pytest.mark.parametrize(("seconds", "fps"), [(5, 16), (60, 16), (0.01, 16), (1, 24), (10.0625, 16), (2.5, 7), (0.5625, 16)])
def test_seconds(seconds: float, fps: int) -> None:
    num_frames = frames_of_latents(latents_of_seconds(seconds, fps))
    assert num_frames >= seconds * fps - 1e-6
    assert num_frames == 1 or num_frames - 4 < seconds * fps
