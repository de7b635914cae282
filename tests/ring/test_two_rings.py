"""Guidance halves on rings of their own: the bits of one ring with micro-batches, whatever else a job has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.errors import NotFinite
from dualparal.method.schedule import Rules
from dualparal.method.step_cache import StepCache
from tests.local_ring import denoise_in_threads
from tests.ring.test_ring import CASE, paper_order, same_bits
from tests.ring.test_saved_sweeps import KeepsAll
from tests.texts import some_texts

HALVES = Rules(micro_batches=True)
EARLY = Rules(micro_batches=True, max_in_flight=3, stagger=2, left_context="own_step", context="cached", refresh=3)
VARIANTS: dict[str, Rules] = {
    "paper": HALVES,
    "cached, early": EARLY,
    "guided in between": replace(EARLY, guided_steps=(1, 4)),
    "guided at first": replace(HALVES, guided_steps=(0, 2)),
    "steps skipped": replace(EARLY, refresh=0, step_cache=StepCache(interval=2, before=1)),
}


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_one_ring(tiny: Path, variant: str, stages: int) -> None:
    case: dict[str, Any] = {**CASE, "texts": some_texts(lengths=(6, 9)), "rules": VARIANTS[variant]}
    one = denoise_in_threads(tiny, **case)
    found = denoise_in_threads(tiny, ranks=stages, guidance_parallel=2, delay_seed=stages, is_nccl=stages == 2, **case)
    assert same_bits(found, one)


def test_uneven_layers_bfloat16_and_caches_in_host_memory(tiny: Path) -> None:
    case: dict[str, Any] = {**CASE, "texts": some_texts(), "rules": EARLY, "dtype": "bfloat16", "is_cache_offloaded": True}
    one = denoise_in_threads(tiny, **case)
    assert same_bits(denoise_in_threads(tiny, ranks=2, layer_split=(1, 3), guidance_parallel=2, delay_seed=3, **case), one)


@pytest.mark.parametrize("rules", [HALVES, EARLY])
def test_two_experts(tiny_two: Path, rules: Rules) -> None:
    case: dict[str, Any] = dict(texts=some_texts(), guidance=(4.0, 3.0), boundary_ratio=0.9, rules=rules, **CASE)
    one = denoise_in_threads(tiny_two, **case)
    assert same_bits(denoise_in_threads(tiny_two, ranks=2, guidance_parallel=2, delay_seed=1, **case), one)


def test_without_guidance_the_second_ring_is_idle(tiny: Path) -> None:
    case: dict[str, Any] = {**CASE, "texts": some_texts(guided=False), "guidance": (1.0, 1.0)}
    one = denoise_in_threads(tiny, **case)
    assert same_bits(denoise_in_threads(tiny, ranks=2, guidance_parallel=2, **case), one)


@pytest.mark.parametrize("rules", [EARLY, replace(EARLY, guided_steps=(2, 5)), replace(HALVES, guided_steps=(0, 3))])
def test_texts_that_come_on_the_way(tiny: Path, rules: Rules) -> None:
    """Each ring hears a text with its own first item that listens to it, and forgets it with its last (`denoise_in_threads`
    asserts that nothing of it is kept)."""
    plain = some_texts()[0]
    torch.manual_seed(5)
    texts = [[torch.randn_like(plain[0]), plain[1]] for _ in range(3)]
    case: dict[str, Any] = {**CASE, "texts": texts, "text_of_block": (0, 1, 2, 1), "rules": rules, "num_known": 1}
    one = denoise_in_threads(tiny, **case)
    for stages in (1, 2):
        assert same_bits(denoise_in_threads(tiny, ranks=stages, guidance_parallel=2, delay_seed=2, **case), one)


@pytest.mark.parametrize("stages", [1, 2])
def test_stop_at_every_item(tiny: Path, stages: int) -> None:
    rules = replace(HALVES, guided_steps=(1, 3))  # the second ring is done before the first
    case: dict[str, Any] = dict(
        latents_num=6, num_per_block=2, num_cat=1, steps=4, rules=rules, texts=some_texts(), ranks=stages, guidance_parallel=2
    )
    order = paper_order(3, 4)
    whole = denoise_in_threads(tiny, **case)
    for stop_after in range(len(order) + 1):
        found = denoise_in_threads(tiny, stop_after=stop_after, may_end=True, delay_seed=stop_after, **case)
        finished = {block for block, step in order[:stop_after] if step == 3}
        assert same_bits(found, {block: whole[block] for block in finished}), f"stopped at block step {stop_after}"
    assert same_bits(denoise_in_threads(tiny, **case), whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_saved_sweep_goes_on_with_another_number_of_rings(tiny: Path, before: int, after: int) -> None:
    case: dict[str, Any] = {**CASE, "texts": some_texts(), "rules": EARLY}
    kept = KeepsAll()
    whole = denoise_in_threads(tiny, ranks=2, guidance_parallel=before, saver=kept, **case)
    assert kept.borders
    for border in kept.borders:
        found = denoise_in_threads(tiny, guidance_parallel=after, resume=border, **case)
        assert same_bits(found, {block: whole[block] for block in whole if block >= border.num_finished})


def test_a_prediction_without_numbers_ends_the_job_on_every_rank(tiny: Path) -> None:
    noise = [torch.randn(1, 4, n, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 3, 3, 3)]
    noise[2][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="block 2 at step 0"):
        denoise_in_threads(tiny, noise=noise, texts=some_texts(), rules=HALVES, ranks=2, guidance_parallel=2, **CASE)
