"""Scheduler settings of checkpoints: what the sampler follows equals `WanPipeline`, the rest is refused before any work."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from dualparal import CheckpointError, Engine
from dualparal.method.sampler import SamplerFactory
from dualparal.model.layout import Checkpoint
from dualparal.model.validation import validate
from tests.local_ring import denoise_in_threads
from tests.texts import joined, some_texts

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
TOLERANCE, STEPS = 1e-5, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "flow_shift 1": {"flow_shift": 1.0},
    "flow_shift 12": {"flow_shift": 12.0},
    "order 1": {"solver_order": 1},
    "order 3": {"solver_order": 3},
    "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "bh1, order 3": {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "the order kept to the end": {
        "lower_order_final": False, "final_sigmas_type": "sigma_min", "use_flow_sigmas": False, "prediction_type": "epsilon",
    },
    "no corrector in the first steps": {"disable_corrector": [0, 1]},
    "no corrector": {"disable_corrector": list(range(STEPS))},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing, without flow": {"timestep_spacing": "trailing", "use_flow_sigmas": False, "prediction_type": "epsilon"},
    "ends at sigma_min": {"final_sigmas_type": "sigma_min"},
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "use_flow_sigmas": False},
    "terminal shift": {"shift_terminal": 0.1},
    "500 timesteps": {"num_train_timesteps": 500},
    "predicts noise": {"use_flow_sigmas": False, "prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
    "predicts velocity": {"use_flow_sigmas": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "predicts the picture": {"prediction_type": "sample", "use_flow_sigmas": False, "beta_schedule": "squaredcos_cap_v2"},
    "a setting of another version": {"a_setting_nobody_knows": 3},
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "shift by size": ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    "beta sigmas": ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
    "noise within": ({"predict_x0": False}, "predict_x0=False"),
    "a predictor of its own": ({"solver_p": {"_class_name": "UniPCMultistepScheduler"}}, "solver_p="),
    "bh1 to the last": ({"solver_type": "bh1"}, "solver_type='bh1' ends in infinite numbers"),
    "order 2 to the last": ({"lower_order_final": False, "final_sigmas_type": "sigma_min"}, "lower_order_final=False ends in"),
    "exponential with flow": ({"use_exponential_sigmas": True}, "use_exponential_sigmas=True goes with"),
    "two spacings": ({"use_exponential_sigmas": True, "use_karras_sigmas": True, "use_flow_sigmas": False}, "exclude each"),
    "another class": ({"_class_name": "DPMSolverMultistepScheduler"}, "is a DPMSolverMultistepScheduler"),
    "flow matching": (dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
                      | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a FlowMatchEulerDiscreteScheduler"),
}  # fmt: skip
ODD = ("x", None, True, -1, 0, 0.5, 10**12, [], ["x"], [0.5], {}, {"a": 1}, math.nan, math.inf)


def with_scheduler(model: Path, folder: Path, change: dict[str, Any]) -> Path:
    """`model` with other scheduler settings, without a copy of its weights."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "scheduler":
            (folder / path.name).symlink_to(path)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | change))
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> WanPipeline:
    made = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore:.*a_setting_nobody_knows.*")
@pytest.mark.parametrize("name", SETTINGS)
def test_one_block_equals_wan_pipeline(tiny: Path, tmp_path: Path, pipeline: WanPipeline, name: str) -> None:
    folder = with_scheduler(tiny, tmp_path / "model", SETTINGS[name])
    checkpoint = Checkpoint(folder)
    validate(checkpoint)
    noise, texts = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), some_texts()
    pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    expected = pipeline(
        prompt_embeds=texts[0][0], negative_prompt_embeds=texts[0][1], height=32, width=32, num_frames=5,
        num_inference_steps=STEPS, guidance_scale=5.0, latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    found = joined(
        denoise_in_threads(
            folder, latents_num=2, num_per_block=2, num_cat=1, steps=STEPS, texts=texts, noise=[noise],
            flow_shift=checkpoint.flow_shift or 1.0,
        )
    )  # fmt: skip
    worst, size = (found - expected).abs().max().item(), expected.abs().max().item()
    assert worst <= TOLERANCE * max(1.0, size), f"off by {worst} of {size}"


def test_each_setting_changes_something(tiny: Path) -> None:
    """So that the comparisons above can fail."""
    config = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    made = {}
    for name, change in SETTINGS.items():
        values = config | change
        factory = SamplerFactory(values, num_steps=STEPS, flow_shift=values["flow_shift"], device="cpu")
        sampler, latents = factory.new(), torch.ones(1, 1, 2, 2, 2)
        for step in range(STEPS):
            latents = sampler.step(torch.full_like(latents, 0.3 + step), latents)
        made[name] = (tuple(factory.timesteps.tolist()), latents.flatten()[0].item())
    same = {name for name in made if made[name] == made["as published"]}
    # Flow sigmas have no spacing to speak of.
    assert same == {"as published", "leading", "a setting of another version"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_followed_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    change, says = OTHERS[name]
    with pytest.raises(CheckpointError, match=says) as caught:
        Engine(with_scheduler(tiny, tmp_path / "model", change), device="cpu")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_odd_values_are_refused_or_followed(tiny: Path, tmp_path: Path) -> None:
    """Every setting of the scheduler, alone: what is not refused makes samplers whose numbers are numbers."""
    folder = with_scheduler(tiny, tmp_path / "model", {})
    file = folder / "scheduler" / "scheduler_config.json"
    config, late = json.loads(file.read_text()), []
    for name in list(inspect.signature(UniPCMultistepScheduler.__init__).parameters)[1:]:
        for value in ODD:
            file.write_text(json.dumps(config | {name: value}))
            checkpoint = Checkpoint(folder)
            try:
                validate(checkpoint)
            except CheckpointError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                continue
            try:
                factory = SamplerFactory(
                    checkpoint.config("scheduler"), num_steps=4, flow_shift=checkpoint.flow_shift or 1.0, device="cpu"
                )
                sampler, latents = factory.new(), torch.ones(1, 1, 2, 2, 2)
                for _ in range(4):
                    latents = sampler.step(torch.full_like(latents, 0.3), latents)
                assert torch.isfinite(latents).all(), "not finite"
            except Exception as error:
                late.append(f"{name}={value!r}: {type(error).__name__}: {str(error)[:80]}")
    assert not late, "\n".join(late)
