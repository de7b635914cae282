"""Coordinated noise: one shared pool, no repeats within [left context | own], a matter of seed and shape only."""

from __future__ import annotations

import pytest
import torch

from dualparal.method.noise import coordinated_noise
from dualparal.method.plan import BlockPlan
from tests.twin import initial_noise

SHAPE = {"channels": 2, "height": 3, "width": 2}


def noise(latents_num: int, num_per_block: int, num_cat: int, seed: int = 0) -> list[torch.Tensor]:
    return list(coordinated_noise(BlockPlan.of(latents_num, num_per_block, num_cat), num_per_block, seed, **SHAPE))


def names(blocks: list[torch.Tensor]) -> list[list[float]]:
    """Each frame by its first value: frames of the pool are told apart by it."""
    return [[float(block[0, 0, frame, 0, 0]) for frame in range(block.shape[2])] for block in blocks]


PLANS = [(latents_num, n, c) for n in (1, 2, 4) for c in range(n + 1) for latents_num in (1, 3, n + c, n + c + 1, 17)]


@pytest.mark.parametrize(("latents_num", "num_per_block", "num_cat"), PLANS)
def test_as_the_method_says(latents_num: int, num_per_block: int, num_cat: int) -> None:
    found = noise(latents_num, num_per_block, num_cat, seed=5)
    plan = BlockPlan.of(latents_num, num_per_block, num_cat)
    expected = initial_noise(plan.lengths, num_per_block, num_cat, (2, 3, 2), seed=5)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [block.shape for block in found] == [(1, 2, length, 3, 2) for length in plan.lengths]
    assert all(block.dtype == torch.float32 and block.device.type == "cpu" for block in found)


def test_blocks_that_are_passed_over_change_nothing() -> None:
    plan = BlockPlan.of_scenes([[30, 9], [20]], 4, 3)
    whole = list(coordinated_noise(plan, 4, 3, **SHAPE))
    for first in range(plan.num_blocks):
        rest = coordinated_noise(plan, 4, 3, **SHAPE)
        for _ in range(first):
            rest.skip()
        found = list(rest)
        assert len(found) == plan.num_blocks - first
        assert all(torch.equal(one, other) for one, other in zip(found, whole[first:], strict=True))


@pytest.mark.parametrize(("latents_num", "num_per_block", "num_cat"), PLANS)
def test_no_frame_repeats_within_left_context_and_own(latents_num: int, num_per_block: int, num_cat: int) -> None:
    blocks = names(noise(latents_num, num_per_block, num_cat))
    for before, own in zip([[], *blocks], blocks, strict=False):
        window = [*before[len(before) - num_cat :], *own] if num_cat else own
        assert len(set(window)) == len(window)


@pytest.mark.parametrize(("num_per_block", "num_cat"), [(4, 0), (4, 2), (4, 4), (1, 1)])
def test_all_blocks_share_one_pool(num_per_block: int, num_cat: int) -> None:
    blocks = names(noise(60, num_per_block, num_cat))
    assert len({name for block in blocks for name in block}) == num_per_block + num_cat
    assert len({tuple(block) for block in blocks[1:6]}) > 1 or num_per_block == 1, "every block has the same noise"


def test_a_matter_of_seed_and_shape_only() -> None:
    expected = noise(17, 4, 2, seed=2**63 - 1)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = noise(17, 4, 2, seed=2**63 - 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert not torch.equal(noise(17, 4, 2, seed=1)[0], noise(17, 4, 2, seed=2)[0])


def test_a_longer_video_begins_with_the_same_noise() -> None:
    short, long = noise(14, 4, 2), noise(40, 4, 2)  # whole blocks
    assert all(torch.equal(one, other) for one, other in zip(short, long, strict=False))


def test_blocks_do_not_share_memory() -> None:
    blocks = noise(17, 4, 2)
    copies = [block.clone() for block in blocks]
    for block in blocks[1:]:
        block.fill_(0)
    assert torch.equal(blocks[0], copies[0])


def test_it_is_gaussian() -> None:
    (block,) = coordinated_noise(BlockPlan.of(12, 8, 4), 8, 0, channels=4, height=32, width=32)
    assert abs(float(block.mean())) < 0.02
    assert abs(float(block.std()) - 1) < 0.02
