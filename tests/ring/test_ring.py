"""The same bits on any number of ranks and under any message timing; Stop at any item leaves cleanly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.errors import NotFinite
from tests.local_ring import denoise_in_threads
from tests.ring.test_saved_sweeps import KeepsAll
from tests.texts import joined, some_texts

CASE: dict[str, Any] = dict(latents_num=14, num_per_block=3, num_cat=2, steps=5)
SPLITS = [(1, None), (2, None), (3, None), (4, None), (2, (1, 3)), (2, (3, 1)), (3, (1, 2, 1)), (3, (2, 1, 1))]


def paper_order(num_blocks: int, steps: int) -> list[tuple[int, int]]:
    """(block, step) in the order of the paper: a new block every sweep, newest first."""
    order = []
    for sweep in range(num_blocks + steps - 1):
        order += [(block, sweep - block) for block in reversed(range(num_blocks)) if 0 <= sweep - block < steps]
    return order


def same_bits(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[block], other[block]) for block in one)


@pytest.fixture(scope="module")
def on_one_rank(tiny: Path) -> dict[int, torch.Tensor]:
    return denoise_in_threads(tiny, texts=some_texts(), **CASE)


@pytest.mark.parametrize(("ranks", "layer_split"), SPLITS)
def test_any_split(tiny: Path, on_one_rank: dict[int, torch.Tensor], ranks: int, layer_split: Sequence[int] | None) -> None:
    found = denoise_in_threads(tiny, texts=some_texts(), ranks=ranks, layer_split=layer_split, **CASE)
    assert same_bits(found, on_one_rank)


@pytest.mark.parametrize("delay_seed", range(4))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_delayed_messages(tiny: Path, on_one_rank: dict[int, torch.Tensor], ranks: int, delay_seed: int) -> None:
    found = denoise_in_threads(tiny, texts=some_texts(), ranks=ranks, delay_seed=delay_seed, **CASE)
    assert same_bits(found, on_one_rank)


@pytest.mark.parametrize("stop_after", [None, 0, 3, 11])
@pytest.mark.parametrize("ranks", [2, 4])
def test_receives_posted_after_the_work(
    tiny: Path, on_one_rank: dict[int, torch.Tensor], ranks: int, stop_after: int | None
) -> None:
    """As over NCCL, whose receives wait on the device."""
    found = denoise_in_threads(tiny, texts=some_texts(), ranks=ranks, delay_seed=1, is_nccl=True, stop_after=stop_after, **CASE)
    assert same_bits(found, on_one_rank) if stop_after is None else set(found) < set(on_one_rank)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("num_cat", [0, 1, 3])
@pytest.mark.parametrize("latents_num", [1, 3, 8])
def test_more_ranks_than_blocks(tiny_sharded: Path, latents_num: int, num_cat: int, guided: bool) -> None:
    case: dict[str, Any] = dict(
        latents_num=latents_num, num_per_block=3, num_cat=num_cat, steps=3, texts=some_texts(guided=guided)
    )
    case["guidance"] = (5.0, 5.0) if guided else (1.0, 1.0)
    one = denoise_in_threads(tiny_sharded, **case)
    for ranks in (4, 7):
        assert same_bits(denoise_in_threads(tiny_sharded, ranks=ranks, delay_seed=ranks, **case), one)


@pytest.mark.parametrize("boundary_ratio", [0.3, 0.9])
def test_two_experts(tiny_two: Path, boundary_ratio: float) -> None:
    case: dict[str, Any] = dict(texts=some_texts(lengths=(6, 9)), guidance=(4.0, 3.0), boundary_ratio=boundary_ratio, **CASE)
    one = denoise_in_threads(tiny_two, **case)
    for ranks, split in ((2, (2, 1)), (2, (1, 2)), (3, None)):
        assert same_bits(denoise_in_threads(tiny_two, ranks=ranks, layer_split=split, delay_seed=1, **case), one)


def test_bfloat16(tiny: Path) -> None:
    case: dict[str, Any] = dict(texts=some_texts(), dtype="bfloat16", **CASE)
    one = denoise_in_threads(tiny, **case)
    assert all(block.dtype == torch.float32 for block in one.values()), "latents stay in float32"
    assert same_bits(denoise_in_threads(tiny, ranks=3, delay_seed=2, **case), one)
    exact = joined(denoise_in_threads(tiny, texts=some_texts(), **CASE))
    assert 0 < (joined(one) - exact).abs().max() < 0.5
    assert (joined(one) - exact).abs().mean() < 0.02


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_stop_at_every_item(tiny: Path, ranks: int) -> None:
    case: dict[str, Any] = dict(latents_num=8, num_per_block=2, num_cat=1, steps=3)
    order = paper_order(4, 3)  # blocks of 3, 2, 2 and 1 frames
    texts = some_texts()
    whole = denoise_in_threads(tiny, texts=texts, ranks=ranks, **case)
    assert len(whole) == 4
    for stop_after in range(len(order) + 1):
        found = denoise_in_threads(tiny, texts=texts, ranks=ranks, stop_after=stop_after, delay_seed=stop_after, **case)
        finished = {block for block, step in order[:stop_after] if step == 2}
        assert same_bits(found, {block: whole[block] for block in finished}), f"stopped at item {stop_after}"
    # The next job on the same stages is untouched by the stopped ones.
    assert same_bits(denoise_in_threads(tiny, texts=texts, ranks=ranks, **case), whole)


def test_stop_at_every_item_around_the_switch(tiny_two: Path) -> None:
    case: dict[str, Any] = dict(latents_num=6, num_per_block=2, num_cat=2, steps=4, boundary_ratio=0.8, texts=some_texts())
    order = paper_order(2, 4)  # blocks of 4 and 2 frames
    whole = denoise_in_threads(tiny_two, ranks=2, **case)
    for stop_after in range(len(order)):
        found = denoise_in_threads(tiny_two, ranks=2, stop_after=stop_after, **case)
        finished = {block for block, step in order[:stop_after] if step == 3}
        assert same_bits(found, {block: whole[block] for block in finished}), f"stopped at item {stop_after}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_prediction_without_numbers_ends_the_job_on_every_rank(tiny: Path, ranks: int, value: float) -> None:
    """Not a black video: the block and the step, and what to try. The ring is ready for the next job."""
    noise = [torch.randn(1, 4, n, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 3, 3, 3)]
    case: dict[str, Any] = {**CASE, "texts": some_texts(), "ranks": ranks}
    whole = denoise_in_threads(tiny, noise=noise, **case)
    for block in (0, 3):  # the last one is found out while others are under way
        spoilt = [x.clone() for x in noise]
        spoilt[block][0, 0, 0, 0, 0] = value
        kept = KeepsAll()
        with pytest.raises(NotFinite, match=f"block {block} at step 0 .*--dtype"):
            denoise_in_threads(tiny, noise=spoilt, saver=kept, delay_seed=block, **case)
        assert all(x.isfinite().all() for x in kept.blocks.values())
        assert all(x.isfinite().all() for border in kept.borders for x in border.latents.values())
    assert same_bits(denoise_in_threads(tiny, noise=noise, **case), whole)
