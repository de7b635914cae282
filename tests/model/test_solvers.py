"""Each solver is diffusers' own: one block equals `WanPipeline` with that scheduler, many equal the twin, saved ones go on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules, StepCache
from dualparal.request import SOLVERS, SolverName
from tests.local_ring import denoise_in_threads
from tests.ring.test_saved_sweeps import KeepsAll
from tests.texts import joined, some_texts
from tests.twin import Twin

OTHERS: tuple[SolverName, ...] = ("euler", "dpm++")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pipelines(tiny: Path, tiny_two: Path) -> dict[int, WanPipeline]:
    made = {
        1: WanPipeline.from_pretrained(tiny, dtype=torch.float32),
        2: WanPipeline.from_pretrained(tiny_two, dtype=torch.float32),
    }
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def scheduler_of(pipeline: WanPipeline, solver: str, shift: float, steps: int) -> Any:
    if solver != "euler":
        kind = DPMSolverMultistepScheduler if solver == "dpm++" else UniPCMultistepScheduler
        return kind.from_config(pipeline.scheduler.config, flow_shift=shift)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    plain = euler.set_timesteps
    sigmas = [1 - step / steps for step in range(steps)]
    euler.set_timesteps = lambda num_steps, device: plain(sigmas=sigmas, device=device)
    return euler


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_block_equals_the_pipeline(
    pipelines: dict[int, WanPipeline], tiny: Path, tiny_two: Path, solver: SolverName, steps: int, experts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipeline, folder = pipelines[experts], tiny_two if experts == 2 else tiny
    noise, texts = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(steps)), some_texts()
    monkeypatch.setattr(pipeline, "scheduler", scheduler_of(pipeline, solver, 5.0, steps))
    expected = pipeline(
        prompt_embeds=texts[0][0], negative_prompt_embeds=texts[0][1], height=32, width=32, num_frames=13,
        num_inference_steps=steps, guidance_scale=4.0, guidance_scale_2=3.0 if experts == 2 else None,
        latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    found = denoise_in_threads(
        folder, latents_num=4, num_per_block=4, num_cat=1, steps=steps, texts=texts, guidance=(4.0, 3.0), flow_shift=5.0,
        boundary_ratio=pipeline.config.boundary_ratio, noise=[noise], solver=solver,
    )  # fmt: skip
    assert expected.std() > 0.3
    assert (found[0] - expected).abs().max() <= TOLERANCE


def test_euler_steps_where_distilled_models_were_trained() -> None:
    """Timesteps of LightX2V's 4-step family: shift 5 of an even division; diffusers' own division ends at 24."""
    factory = SamplerFactory({}, num_steps=4, flow_shift=5.0, device="cpu", solver="euler")
    assert factory.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625])
    assert factory.experts(0.875) == (0, 0, 1, 1)
    eight = SamplerFactory({}, num_steps=8, flow_shift=5.0, device="cpu", solver="euler").timesteps.tolist()
    assert eight == pytest.approx([5000 * u / (1 + 4 * u) for u in (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)])


@functools.cache
def twin_of(folder: Path) -> Twin:
    return Twin(folder)


@pytest.mark.parametrize("context", ["recomputed", "cached"])
@pytest.mark.parametrize("solver", OTHERS)
def test_many_blocks_equal_the_twin_on_any_number_of_ranks(tiny_two: Path, solver: SolverName, context: Any) -> None:
    case: dict[str, Any] = {
        "latents_num": 13, "num_per_block": 3, "num_cat": 2, "steps": 4, "texts": some_texts(), "seed": 3, "flow_shift": 5.0,
        "boundary_ratio": 0.875, "solver": solver,
    }  # fmt: skip
    rules = Rules(context=context)
    found = [joined(denoise_in_threads(tiny_two, ranks=ranks, rules=rules, **case)) for ranks in (1, 3)]
    expected = joined(twin_of(tiny_two).run(**case, context=context))
    assert (found[0] - expected).abs().max() <= TOLERANCE
    assert torch.equal(*found)
    unipc = joined(denoise_in_threads(tiny_two, rules=rules, **{**case, "solver": "unipc"}))
    assert (found[0] - unipc).abs().max() > 1e-3, "the solver makes no difference"


@pytest.mark.parametrize("rules", [Rules(), Rules(step_cache=StepCache(interval=2, max_order=1, before=2))])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_saved_border_goes_on_to_the_same_bits(tiny: Path, solver: SolverName, rules: Rules) -> None:
    job: dict[str, Any] = {
        "latents_num": 9, "num_per_block": 3, "num_cat": 1, "steps": 5, "texts": some_texts(), "rules": rules, "solver": solver,
    }  # fmt: skip
    kept = KeepsAll()
    whole = denoise_in_threads(tiny, saver=kept, **job)
    assert len(kept.borders) > 3
    for border in kept.borders:
        rest = denoise_in_threads(tiny, resume=border, **job)
        assert all(torch.equal(rest[block], whole[block]) for block in rest)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_writes_into_nothing_it_is_given(solver: SolverName) -> None:
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    sampler = SamplerFactory(config, num_steps=6, flow_shift=3.0, device="cpu", solver=solver).new()
    latents = torch.randn(1, 2, 3, 2, 2)
    kept = []
    for _ in range(6):
        prediction = torch.randn_like(latents)
        kept += [(given, given.clone()) for given in (prediction, latents)]
        latents = sampler.step(prediction, latents)
    assert all(torch.equal(given, before) for given, before in kept)
