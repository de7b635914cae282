"""What an engine completes a request with: own values, the preset's, the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest
from dualparal.model.tiny import write_tiny_checkpoint
from dualparal.presets import FLOW_SHIFT, Preset

ASKED = GenerationRequest(prompt="x", latents_num=4, height=32, width=32)


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """A checkpoint that no preset knows, with a flow shift of its own."""
    write_tiny_checkpoint(tmp_path / "mine", flow_shift=7.5)
    return tmp_path / "mine"


def test_a_checkpoints_own_flow_shift_is_used_where_no_preset_says(shifted: Path, tmp_path: Path) -> None:
    engine = Engine(shifted, device="cpu", outputs=tmp_path / "outputs")
    assert engine.resolve(ASKED).flow_shift == engine.preset.flow_shift == 7.5, "the page shows what is used"
    assert engine.resolve(ASKED.model_copy(update={"flow_shift": 2.0})).flow_shift == 2.0
    says = Engine(shifted, preset=Preset(flow_shift=5.0), device="cpu", outputs=tmp_path / "outputs")
    assert says.resolve(ASKED).flow_shift == 5.0
    config = shifted / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "flow_shift"}))
    assert Engine(shifted, device="cpu", outputs=tmp_path / "outputs").resolve(ASKED).flow_shift == FLOW_SHIFT


@pytest.mark.parametrize("preset", [None, Preset(model="Wan-AI/Some")])
def test_settings_name_the_model_without_its_path(shifted: Path, tmp_path: Path, preset: Preset | None) -> None:
    settings = Engine(shifted, preset=preset, device="cpu", outputs=tmp_path / "outputs").resolve(ASKED)
    assert settings.model == "mine" and str(tmp_path) not in settings.to_json()
    assert Engine("pocket", device="cpu", outputs=tmp_path / "outputs").resolve(GenerationRequest(prompt="x")).model == "pocket"
