"""An engine plans what differs in prompts and seed only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualparal import Engine, GenerationRequest
from dualparal.engine import setup
from dualparal.engine.setup import KNOWN_PLANS
from dualparal.planning.job_plan import plan_job


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been planned from now on."""
    found: list[Any] = []
    monkeypatch.setattr(setup, "plan_job", lambda request, *a, **k: found.append(request) or plan_job(request, *a, **k))
    return found


def test_prompts_and_seeds_change_no_plan(tiny: Path, tmp_path: Path, planned: list[Any]) -> None:
    engine = Engine(tiny, ranks=2, device="cpu", outputs=tmp_path)
    base = engine.resolve(GenerationRequest(prompt="a", latents_num=9, height=32, width=32))
    texts = (("a", "", 1), ("b" * 3000, "blur", 2), ("c", "x", 2**31))
    made = [base.model_copy(update={"prompt": a, "negative_prompt": b, "seed": seed}) for a, b, seed in texts]
    plans = [engine.plan(settings, is_short=True) for settings in made]
    assert len(planned) == 1
    assert [plan.request for plan in plans] == made, "each its own request"
    for settings, plan in zip(made, plans, strict=True):
        alone = plan_job(settings, engine._setup.sizes, engine._setup.placement, is_short=True)
        assert (plan.memory, plan.refusal, plan.work, plan.placement) == (
            alone.memory, alone.refusal, alone.work, alone.placement,
        )  # fmt: skip


def test_whatever_else_differs_is_planned(tiny: Path, tmp_path: Path, planned: list[Any]) -> None:
    engine = Engine(tiny, device="cpu", outputs=tmp_path)
    base = engine.resolve(GenerationRequest(prompt="a", latents_num=9, height=32, width=32))
    changes: list[dict[str, Any]] = [
        {"height": 48}, {"num_inference_steps": 3}, {"num_cat": 1}, {"latents_num": 10}, {"guidance_scale": 1.0},
    ]  # fmt: skip
    needs = [engine.plan(base.model_copy(update=change), is_short=True) for change in changes]
    assert len(planned) == len(changes)
    assert [plan.request for plan in needs] == [base.model_copy(update=change) for change in changes]


def test_what_is_kept_is_bounded(tiny: Path, tmp_path: Path) -> None:
    engine = Engine(tiny, device="cpu", outputs=tmp_path)
    base = engine.resolve(GenerationRequest(prompt="a", latents_num=1, height=16, width=16, num_inference_steps=1))
    for fps in range(1, KNOWN_PLANS + 9):
        engine.plan(base.model_copy(update={"fps": fps}), is_short=True)
    assert engine._setup._short_plans.cache_info().currsize == KNOWN_PLANS
