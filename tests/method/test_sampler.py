"""The sampler of a block: diffusers' UniPC, one state per block, and never a change to the tensors it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from dualparal.errors import CheckpointError
from dualparal.method.sampler import SamplerFactory, experts_of
from dualparal.method.unipc import SharedUniPC

CONFIG: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.33.0", "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": 1.0,
}  # fmt: skip


def predictions(steps: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def plain(steps: int, flow_shift: float, start: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    scheduler.set_timesteps(steps)
    latents = start
    for t, prediction in zip(scheduler.timesteps, given, strict=True):
        latents = scheduler.step(prediction.clone(), t, latents.clone(), return_dict=False)[0]
    return latents


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50])
def test_equals_the_plain_scheduler(steps: int, flow_shift: float) -> None:
    factory = SamplerFactory(CONFIG, num_steps=steps, flow_shift=flow_shift, device="cpu")
    start, given = torch.randn(1, 2, 3, 2, 2), predictions(steps, (1, 2, 3, 2, 2))
    sampler, latents = factory.new(), start.clone()
    for prediction in given:
        latents = sampler.step(prediction, latents)
    assert torch.equal(latents, plain(steps, flow_shift, start, given))
    assert len(factory.timesteps) == steps


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {"disable_corrector": [0, 2]}, {"thresholding": True},
        {"use_flow_sigmas": False, "prediction_type": "epsilon"}, {"use_karras_sigmas": True},
    ],
    ids=lambda settings: " ".join(settings) or "flow",
)  # fmt: skip
def test_numbers_of_a_step_that_are_worked_out_once_give_diffusers_bits(settings: dict[str, Any], order: int) -> None:
    config = {**CONFIG, **settings, "solver_order": order}
    plain = UniPCMultistepScheduler.from_config(config, flow_shift=3.0)
    plain.set_timesteps(7)
    factory = SamplerFactory(config, num_steps=7, flow_shift=3.0, device="cpu")
    ours, latents = factory.new(), torch.randn(2, 3, 5, 6, 7)
    theirs = latents
    for t, prediction in zip(plain.timesteps, predictions(7, tuple(latents.shape)), strict=True):
        latents = ours.step(prediction, latents)
        theirs = plain.step(prediction, t, theirs, return_dict=False)[0]
        assert torch.equal(latents, theirs)
    assert latents.isfinite().all()


def test_they_are_worked_out_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    work_out = SharedUniPC._work_out
    monkeypatch.setattr(SharedUniPC, "_work_out", lambda self, *key: seen.append(key) or work_out(self, *key))
    factory = SamplerFactory(CONFIG, num_steps=5, flow_shift=3.0, device="cpu")
    for seed in range(3):
        sampler, latents = factory.new(), torch.randn(1, 2, 3, 2, 2)
        for prediction in predictions(5, (1, 2, 3, 2, 2), seed):
            latents = sampler.step(prediction, latents)
    assert len(seen) == len(set(seen)) == 5 + 4  # a predictor in each step, a corrector after each but the last


def test_inputs_are_never_changed() -> None:
    """The authors' release updates latents in place while UniPC still holds them as its last sample."""
    factory = SamplerFactory(CONFIG, num_steps=12, flow_shift=3.0, device="cpu")
    sampler, latents = factory.new(), torch.randn(1, 2, 3, 2, 2)
    kept = []
    for prediction in predictions(12, (1, 2, 3, 2, 2)):
        copies = prediction.clone(), latents.clone()
        after = sampler.step(prediction, latents)
        assert torch.equal(prediction, copies[0])
        assert torch.equal(latents, copies[1])
        assert after.data_ptr() not in (latents.data_ptr(), prediction.data_ptr())
        kept.append((latents, copies[1]))
        latents = after
    assert all(torch.equal(given, copy) for given, copy in kept), "a later step wrote into an earlier step's latents"


def test_writing_in_place_would_show() -> None:
    """The test above and the comparisons with diffusers can see that fault: it changes the result."""
    start, given = torch.randn(1, 2, 3, 2, 2), predictions(6, (1, 2, 3, 2, 2))
    sampler = SamplerFactory(CONFIG, num_steps=6, flow_shift=3.0, device="cpu").new()
    latents = start.clone()
    for prediction in given:
        latents.copy_(sampler.step(prediction, latents))
    assert (latents - plain(6, 3.0, start, given)).abs().max() > 0.01


def test_blocks_do_not_share_a_state() -> None:
    factory = SamplerFactory(CONFIG, num_steps=5, flow_shift=3.0, device="cpu")
    starts = [torch.randn(1, 2, n, 2, 2) for n in (3, 2)]
    given = [predictions(5, (1, 2, n, 2, 2), seed=n) for n in (3, 2)]
    samplers, latents = [factory.new(), factory.new()], list(starts)
    for sweep in range(6):  # the second block is one step behind
        for block in (1, 0):
            if 0 <= sweep - block < 5:
                latents[block] = samplers[block].step(given[block][sweep - block], latents[block])
    for block in (0, 1):
        assert torch.equal(latents[block], plain(5, 3.0, starts[block], given[block]))


def test_timesteps_are_exact() -> None:
    """50 steps at shift 12 are 50 timesteps; in bfloat16 they would collapse to 43."""
    timesteps = SamplerFactory(CONFIG, num_steps=50, flow_shift=12.0, device="cpu").timesteps
    assert timesteps.dtype in (torch.int64, torch.float32)
    assert len(set(timesteps.tolist())) == 50
    assert timesteps.tolist() == sorted(timesteps.tolist(), reverse=True)


def test_the_checkpoints_config_counts_but_for_flow_shift() -> None:
    order_1 = SamplerFactory({**CONFIG, "solver_order": 1}, num_steps=4, flow_shift=3.0, device="cpu").new()
    order_2 = SamplerFactory(CONFIG, num_steps=4, flow_shift=3.0, device="cpu").new()
    one = two = torch.randn(1, 2, 3, 2, 2)
    for prediction in predictions(4, (1, 2, 3, 2, 2)):
        one, two = order_1.step(prediction, one), order_2.step(prediction, two)
    assert not torch.equal(one, two)


def test_unknown_schedulers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="FlowMatchEulerDiscreteScheduler"):
        SamplerFactory({"_class_name": "FlowMatchEulerDiscreteScheduler"}, num_steps=4, flow_shift=3.0, device="cpu")


def test_experts() -> None:
    assert experts_of([999, 875, 874.9, 500, 0], 0.875, 1000) == (0, 0, 1, 1, 1)
    assert experts_of([999, 500], None, 1000) == (0, 0)
    assert experts_of([999, 0], 0.0, 1000) == (0, 0)
    assert experts_of([999, 0], 1.0, 1000) == (1, 1)
    factory = SamplerFactory(CONFIG, num_steps=50, flow_shift=12.0, device="cpu")
    experts = factory.experts(0.875)
    assert experts == tuple(sorted(experts)), "once switched, never back"
    assert set(experts) == {0, 1}
