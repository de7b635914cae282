"""The distillation: targets are the teacher's, the file is the student's as the engine merges it, a run goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dualparal.method.sampler import SamplerFactory
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_source import find_loras
from dualparal.model.source import POCKET_WEIGHTS
from training import distill


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(distill, "WINDOW_LATENTS", (2, 3))
    monkeypatch.setattr(distill, "USES", 2)


def test_levels_are_those_that_euler_steps_through() -> None:
    sampler = SamplerFactory({}, num_steps=distill.NUM_STEPS, flow_shift=distill.SHIFT, device="cpu", solver="euler")
    assert distill.levels() == pytest.approx(sampler.sigmas)


def test_the_targets_are_the_teachers_whatever_the_student_has_learnt() -> None:
    student = distill.Student()
    with torch.no_grad():
        for lora in student.loras.values():
            lora.up.normal_(std=0.02)
    batch = distill.make_batch(student, np.random.default_rng(0))
    steps, size = batch.x.shape[:2]
    assert steps == distill.NUM_STEPS and len(batch.captions) == size and batch.target.shape == batch.x.shape
    text, nothing = student.read(batch.captions), student.read([""] * size)
    here, there = distill.levels()[2:4]
    x = batch.x[2].float()
    with torch.no_grad():
        plain = [student.velocity(x, torch.full((size,), here), one, with_lora=False) for one in (nothing, text)]
        first = torch.lerp(*plain, distill.GUIDANCE)
        half = torch.full((size,), (here + there) / 2)
        plain = [student.velocity(x + (there - here) / 2 * first, half, one, with_lora=False) for one in (nothing, text)]
        moved = x + (there - here) * student.velocity(x, torch.full((size,), here), text, with_lora=True)
    assert (torch.lerp(*plain, distill.GUIDANCE) - batch.target[2].float()).abs().max() < 0.02, "half precision"
    assert (moved - batch.x[3].float()).abs().max() < 0.02


def test_windows_as_the_engines_end_with_latents_a_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    student, seen = distill.Student(), []
    monkeypatch.setattr(distill, "RIGHT_LATENTS", (1, 1))
    batch = distill.make_batch(student, np.random.default_rng(3))
    real = student.velocity
    monkeypatch.setattr(
        student, "velocity", lambda x, level, *more, **how: seen.append((x, level)) or real(x, level, *more, **how)
    )
    num_latents, grid = batch.x.shape[3], distill.levels()
    found = set()
    for seed in range(12):
        assert distill._loss_as_blocks(student, batch, np.random.default_rng(seed)).isfinite()
        (x, level), seen[:] = seen[0], []
        per_latent = level.unflatten(1, (-1, distill.TOKENS_PER_LATENT))[0, :, 0].tolist()
        step = grid.index(pytest.approx(per_latent[0]))
        found.add(step)
        assert torch.equal(x[:, :, : num_latents - 1], batch.x[step].float()[:, :, :-1])
        if step == 0:
            assert x.shape[2] == num_latents - 1, "the next block has not entered"
        else:
            assert per_latent == pytest.approx([grid[step]] * (num_latents - 1) + [grid[step - 1]])
            assert torch.equal(x[:, :, -1], batch.x[step - 1].float()[:, :, -1])
    assert found == {0, 1, 2, 3}


def test_it_goes_on_where_it_was_and_its_file_is_the_students(tmp_path: Path) -> None:
    for _ in distill.training_steps(tmp_path / "whole", 0, 4):
        pass
    (tmp_path / "parts").mkdir()
    for num_steps in (2, 4):
        for _ in distill.training_steps(tmp_path / "parts", 0, num_steps):
            pass
    whole, parts = (torch.load(tmp_path / name / "distill.pt", weights_only=False) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert all(value.abs().max() > 0 for name, value in whole["lora"].items())
    assert [batch["captions"] for batch in whole["kept"]] == [batch["captions"] for batch in parts["kept"]]
    distill.export(tmp_path / "whole", tmp_path / "fast.safetensors")
    assert (tmp_path / "fast.safetensors").stat().st_size <= 2_000_000
    student = distill.Student()
    student.load_state_dict(whole["ema"], strict=False)
    merged = load_transformer_share(
        Checkpoint(POCKET_WEIGHTS), "transformer", range(6), dtype=torch.float32, device=torch.device("cpu"),
        loras=find_loras([str(tmp_path / "fast.safetensors")], 1),
    )  # fmt: skip
    for name, lora in student.loras.items():
        wanted = lora.weight + lora.up @ lora.down
        assert (merged.get_submodule(name).weight - wanted).abs().max() < 1e-3 * wanted.abs().max()
