"""8-bit LoRA files with scales merge as the same file dequantised by hand, bit for bit; without scales they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualparal.errors import CheckpointError
from dualparal.model import lora_file
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_file import check_loras
from dualparal.model.lora_source import Lora
from dualparal.model.part_shapes import transformer_shapes
from tests.model.test_lora import RANK, State, random_pairs, write
from tests.model.test_lora_layouts import O, merged, pair, plain
from tests.model.test_scales import FP8, FP8_WIDE, by_blocks, per_channel, per_tensor

KINDS = {
    "per tensor": (FP8, per_tensor, "scale_weight"),
    "per tensor, e5m2": (FP8_WIDE, per_tensor, "weight_scale"),
    "per output": (FP8, per_channel, "weight_scale"),
    "int8": (torch.int8, per_channel, "weight_scale"),
    "int8, groups": (torch.int8, by_blocks(1, 3), "scale_weight"),
    "blocks": (FP8, by_blocks(128, 128), "weight_scale_inv"),
}
ENDS = {"with `.weight`": ".weight", "without": ""}


def both_forms(name: str, end: str) -> tuple[State, State]:
    """(as stored with scales, what it stands for)."""
    dtype, scale, word = KINDS[name]
    stored: State = {"scaled_fp8": torch.zeros(2, dtype=FP8), "diffusion_model.scaled_fp8": torch.zeros(0)}
    meant: State = {}
    for module, halves in random_pairs().items():
        for half, value in zip(("lora_A", "lora_B"), halves, strict=True):
            base = f"diffusion_model.{module}.{half}"
            stored[f"{base}{end}"], meant[f"{base}{end}"], number = scale(value, dtype)
            stored[f"{base}.{word}"] = number.clone()
        stored[f"diffusion_model.{module}.alpha"] = meant[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
    return stored, meant


@pytest.fixture(autouse=True)
def forget_files() -> None:
    lora_file._read_lora.cache_clear()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", KINDS)
def test_equal_to_the_dequantised_file(tiny: Path, tmp_path: Path, name: str, end: str) -> None:
    stored, meant = both_forms(name, ENDS[end])
    found = merged(tiny, write(tmp_path, stored, "scaled.safetensors"), 0.5)
    expected, before = merged(tiny, write(tmp_path, meant, "plain.safetensors"), 0.5), plain(tiny)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    for module, (down, up) in random_pairs().items():
        delta = found[f"{module}.weight"] - before[f"{module}.weight"]
        off = (delta - 0.5 * 2.0 / RANK * up @ down).abs().max() / delta.abs().max()
        assert off < 0.25, "another LoRA"  # two bits after the point in e5m2


def test_a_merge_written_out(tiny: Path, tmp_path: Path) -> None:
    """Matrices of 16 and 3, stored as ones with the scales 16 and 3: rank 3, alpha 6."""
    state = {key: value.to(FP8) for key, value in pair(base=O).items()}
    state |= {f"{O}.lora_A.scale_weight": torch.tensor(16.0), f"{O}.lora_B.weight_scale": torch.tensor([3.0])}
    state[f"{O}.alpha"] = torch.tensor(6.0)
    key = "blocks.0.attn1.to_q.weight"
    expected = plain(tiny)[key] + 6.0 / 3 * (3 * 16.0 * 3.0)
    torch.testing.assert_close(merged(tiny, write(tmp_path, state))[key], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{O}.lora_A.scale_weight": torch.ones(7)}, r"q\.lora_A\.scale_weight has the shape \[7\]"),
        ({f"{O}.lora_C.scale_weight": torch.ones(1)}, r"q\.lora_C\.scale_weight is the scale of a weight that is not there"),
        ({f"{O}.lora_A.scale_weight": torch.ones(1), f"{O}.lora_A.weight_scale": torch.ones(1)}, "are scales of one weight"),
        ({f"{O}.lora_A.weight_scale": torch.ones(1, dtype=torch.int32)}, r"lora_A\.weight_scale is stored as I32"),
        ({f"{O}.lora_A.weight": torch.ones(RANK, 24, dtype=torch.int8)}, r"lora_A\.weight is stored as I8 without a scale"),
        ({f"{O}.lora_A.weight": torch.ones(RANK, 24, dtype=torch.uint8), f"{O}.lora_A.weight_scale": torch.ones(1)},
         r"lora_A\.weight is stored as U8;"),
    ],
)  # fmt: skip
def test_refused_before_any_work(tiny: Path, tmp_path: Path, change: State, says: str) -> None:
    path = write(tmp_path, pair(base=O) | change)
    with pytest.raises(CheckpointError, match=says) as caught:
        check_loras([Lora("a LoRA", str(path))], 1, transformer_shapes(Checkpoint(tiny).config("transformer")))
    assert "\n" not in str(caught.value)


def test_a_scale_that_is_no_number(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, pair(base=O) | {f"{O}.lora_B.scale_weight": torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match=r"q\.lora_B\.scale_weight holds NaN"):
        merged(tiny, path)
