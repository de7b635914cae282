"""Step caching: one block as diffusers' TaylorSeer does it, many as the twin says, the same bits on any ranks and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TaylorSeerCacheConfig, WanPipeline

from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.ring.saved_sweeps import read_state, write_sweep
from tests.local_ring import denoise_in_threads
from tests.method.test_sampler import CONFIG
from tests.model.test_one_block import TOLERANCE, run_pipeline
from tests.ring.test_saved_sweeps import KeepsAll
from tests.texts import as_said, joined, some_texts
from tests.twin import Twin

STEPS = 9
CACHE = StepCache(interval=3, before=2)
RULES = {
    "paper": Rules(step_cache=CACHE),
    "paper, every second": Rules(step_cache=replace(CACHE, interval=2, max_order=2)),
    "paper, repeated": Rules(step_cache=replace(CACHE, max_order=0, before=1)),
    "paper, last steps computed": Rules(step_cache=replace(CACHE, after=6)),
    "cached": Rules(context="cached", step_cache=CACHE),
    "preview": Rules(left_context="own_step", max_in_flight=3, stagger=3, step_cache=CACHE),
    "preview, cached": Rules(left_context="own_step", max_in_flight=2, stagger=4, context="cached", step_cache=CACHE),
    "preview, one at a time": Rules(left_context="own_step", max_in_flight=1, step_cache=CACHE),
    "guidance in the middle": Rules(guided_steps=(3, 7), step_cache=CACHE),
    "guidance in the middle, cached": Rules(guided_steps=(3, 7), context="cached", step_cache=replace(CACHE, interval=2)),
}
PLANS = [(11, 3, 2), (10, 3, 3), (9, 4, 0), (9, 1, 1)]


def a_case(folder: Path, plan: tuple[int, int, int] = (11, 3, 2)) -> dict[str, Any]:
    latents_num, num_per_block, num_cat = plan
    return {
        "latents_num": latents_num, "num_per_block": num_per_block, "num_cat": num_cat, "steps": STEPS, "texts": some_texts(),
        "boundary_ratio": 0.875 if "two" in folder.name else None,
    }  # fmt: skip


# diffusers


def difference_to_diffusers(
    folder: Path, cache: StepCache, steps: int, guidance: float, *, boundary_ratio: float | None = None
) -> tuple[float, float]:
    """Largest difference to the pipeline with step caching, and of that to the pipeline without."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(boundary_ratio=boundary_ratio)
    noise = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(steps))
    texts = some_texts(guided=guidance > 1)
    plain = run_pipeline(pipeline, noise, texts[0], steps, (guidance, guidance))
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        if transformer is not None:
            transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=cache.interval, disable_cache_before_step=cache.before, disable_cache_after_step=cache.after,
                    max_order=cache.max_order, taylor_factors_dtype=torch.float32, use_lite_mode=True,
                )
            )  # fmt: skip
    expected = run_pipeline(pipeline, noise, texts[0], steps, (guidance, guidance))
    found = denoise_in_threads(
        folder, latents_num=4, num_per_block=4, num_cat=1, steps=steps, texts=texts, guidance=(guidance, guidance),
        noise=[noise], rules=Rules(step_cache=cache), boundary_ratio=boundary_ratio,
    )  # fmt: skip
    return (joined(found) - expected).abs().max().item(), (expected - plain).abs().max().item()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("max_order", [0, 1, 2])
@pytest.mark.parametrize(("interval", "before", "after", "steps"), [(2, 3, None, 21), (3, 2, 15, 20), (5, 3, 27, 30)])
def test_one_block_is_diffusers_taylorseer(
    tiny: Path, interval: int, before: int, after: int | None, steps: int, max_order: int, guidance: float
) -> None:
    cache = StepCache(interval=interval, max_order=max_order, before=before, after=after)
    off, effect = difference_to_diffusers(tiny, cache, steps, guidance)
    assert off <= TOLERANCE
    assert effect > 1e-3, "caching changed nothing, so that the comparison proves little"


def test_both_experts_are_diffusers_taylorseer(tiny_two: Path) -> None:
    """diffusers counts each expert's steps from its own first one; the two patterns meet when the switch is on the interval."""
    steps = 20
    samplers = SamplerFactory(CONFIG, num_steps=steps, flow_shift=3.0, device="cpu")
    switch = 8
    boundary_ratio = (float(samplers.timesteps[switch]) + 0.5) / 1000
    assert samplers.experts(boundary_ratio).count(0) == switch
    cache = StepCache(interval=4, before=2)
    off, effect = difference_to_diffusers(tiny_two, cache, steps, 5.0, boundary_ratio=boundary_ratio)
    assert off <= TOLERANCE
    assert effect > 1e-3


# many blocks


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", RULES)
def test_many_blocks_equal_the_twin(name: str, plan: tuple[int, int, int], tiny: Path, tiny_two: Path) -> None:
    for folder in (tiny, tiny_two) if plan == PLANS[0] else (tiny,):
        case = a_case(folder, plan)
        expected = joined(Twin(folder).run(**case, **as_said(RULES[name])))
        found = joined(denoise_in_threads(folder, **case, rules=RULES[name]))
        assert 0.3 < expected.std() < 3
        assert (found - expected).abs().max() <= TOLERANCE
        computed = joined(denoise_in_threads(folder, **case, rules=replace(RULES[name], step_cache=None)))
        assert (found - computed).abs().max() > 1e-3, "nothing was skipped"


@pytest.mark.parametrize("name", RULES)
def test_same_bits_on_any_ranks_and_halves_one_by_one(name: str, tiny_two: Path, tiny: Path) -> None:
    for folder, on_ranks in ((tiny_two, ((2,), (3,))), (tiny, ((2, 4), (3,)))):
        found = []
        for micro_batches, others in zip((False, True), on_ranks, strict=True):
            rules = replace(RULES[name], micro_batches=micro_batches)
            found.append(joined(denoise_in_threads(folder, **a_case(folder), rules=rules)))
            for ranks in others:
                again = denoise_in_threads(folder, **a_case(folder), rules=rules, ranks=ranks, delay_seed=ranks)
                assert torch.equal(found[-1], joined(again))
        assert (found[0] - found[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["paper", "paper, every second", "preview", "guidance in the middle"])
def test_every_border_gives_the_same_bits(name: str, tiny: Path, tiny_two: Path, tmp_path: Path) -> None:
    for folder in (tiny, tiny_two):
        kept = KeepsAll()
        whole = denoise_in_threads(folder, **a_case(folder), rules=RULES[name], ranks=2, delay_seed=1, saver=kept)
        assert any("factors.1" in tensors for border in kept.borders for tensors in border.samplers.values())
        for number, border in enumerate(kept.borders):
            write_sweep(tmp_path, replace(border, num_finished=0))
            state, _ = read_state(tmp_path)
            assert state is not None
            rest = denoise_in_threads(folder, **a_case(folder), rules=RULES[name], ranks=1 + number % 3, resume=state)
            assert sorted(rest) == list(range(border.num_finished, len(whole)))
            assert all(torch.equal(rest[block], whole[block]) for block in rest)


@pytest.mark.parametrize("name", ["paper", "preview, one at a time"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_stop_at_every_item(name: str, ranks: int, tiny: Path) -> None:
    case = a_case(tiny, (5, 2, 1))
    whole = denoise_in_threads(tiny, **case, rules=RULES[name], ranks=ranks)
    items = make_schedule(RULES[name], BlockPlan.of(5, 2, 1), (0,) * STEPS).items
    for stop_after in range(len(items) + 1):
        found = denoise_in_threads(tiny, **case, rules=RULES[name], ranks=ranks, stop_after=stop_after, delay_seed=stop_after)
        assert sorted(found) == sorted(item.block for item in items[:stop_after] if item.step == STEPS - 1)
        assert all(torch.equal(found[block], whole[block]) for block in found), f"stopped at item {stop_after}"
