"""Which expert a LoRA is for: what its name says, what the user says, what the log tells."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from dualparal.errors import CheckpointError, RequestError
from dualparal.model.lora_file import check_loras
from dualparal.model.lora_source import expert_in, find_loras
from tests.model.test_lora import as_diffusers, write

HIGH = ["style_HIGH", "Wan2.2-highnoise-v1", "high_noise_model", "wan22-high-dance", "x_h_rank32", "HighNoise",
        "wan_t2v_HIGHNOISE_e10",
        "MyStyle-HN", "style high noise", "t2vHighNoise", "style.High.v2", "style_H"]  # fmt: skip
NEITHER = ["highres", "highlight", "slow", "flow", "high_res_fix", "low_light", "high-quality-skin", "HighHeels", "lowpoly",
           "low-poly",
           "below", "thigh", "shallow", "yellow", "high_low",
           "flowmatch", "model", "x_h_264", "hl", "low_rank_64", "high-vram"]  # fmt: skip


@pytest.mark.parametrize("name", HIGH)
def test_names_that_say_high_or_low(name: str) -> None:
    assert expert_in(f"{name}.safetensors") == 0
    low = name
    for high, other in (("HIGH", "LOW"), ("High", "Low"), ("high", "low"), ("_h_", "_l_"), ("HN", "LN"), ("_H", "_L")):
        if high in low:
            low = low.replace(high, other)
            break
    assert expert_in(f"{low}.safetensors") == 1, low


@pytest.mark.parametrize("name", NEITHER)
def test_names_that_say_neither(name: str) -> None:
    assert expert_in(f"{name}.safetensors") is None


def test_said_outright(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, as_diffusers(num_layers=1), "style_LOW.safetensors")
    (lora,) = find_loras([f"high:{path}:0.8"], 2)
    assert (lora.experts, lora.scale, lora.label) == ((0,), 0.8, f"high:{path}:0.8")
    assert find_loras([lora.label], 2) == (lora,)
    (lora,) = find_loras([f"low:{path}"], 2)
    assert (lora.experts, lora.scale) == ((1,), 1.0)
    with pytest.raises(RequestError, match="this model has one expert"):
        find_loras([f"low:{path}"], 1)
    with caplog.at_level(logging.INFO):
        assert find_loras([str(path)], 2)[0].experts == (1,)
    assert "goes to the low-noise expert, of which its name speaks" in caplog.text


def test_a_name_that_says_nothing_goes_to_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, as_diffusers(num_layers=1), "highlights.safetensors")
    assert find_loras([f"{path}:0.5"], 2)[0].experts == (0, 1)
    assert "goes to both experts" in caplog.text


def test_a_folder_with_one_of_each(tmp_path: Path) -> None:
    for name in ("style_HIGH.safetensors", "style_LOW.safetensors"):
        write(tmp_path, as_diffusers(num_layers=1), name)
    assert [lora.experts for lora in find_loras([f"{tmp_path}:0.5"], 2)] == [(0,), (1,)]
    assert [lora.file for lora in find_loras([f"low:{tmp_path}"], 2)] == [str(tmp_path / "style_LOW.safetensors")]


@pytest.mark.parametrize("spec", [r"C:\loras\x.safetensors", "C:/loras/x.safetensors", r"high:C:\loras\x.safetensors:0.5"])
def test_a_drive_is_no_scale(spec: str) -> None:
    with pytest.raises(CheckpointError, match="there is no LoRA"):
        find_loras([spec], 2)


def test_a_file_of_both_experts_for_one_that_was_said(tmp_path: Path) -> None:
    state = {
        f"{component}.proj_out.lora_{half}.weight": torch.ones(*size)
        for component in ("transformer", "transformer_2") for half, size in (("A", (1, 4)), ("B", (4, 1)))
    }  # fmt: skip
    path = write(tmp_path, state)
    for said in ("low", "high"):
        (lora,) = find_loras([f"{said}:{path}"], 2)
        check_loras([lora], 2, {"proj_out.weight": (4, 4)})
