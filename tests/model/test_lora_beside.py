"""LoRAs of one video beside the weights: as merged ones, no trace afterwards, the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.errors import CheckpointError
from dualparal.method.schedule import Rules
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_beside import LoraCache, LorasBeside
from dualparal.model.lora_source import find_loras
from dualparal.model.stage import Stage
from tests.local_ring import denoise_in_threads
from tests.model.test_lora import as_diffusers, as_original, write
from tests.texts import joined, some_texts

CASE: dict[str, Any] = {"latents_num": 9, "num_per_block": 3, "num_cat": 2, "steps": 4, "seed": 3}
TOLERANCE = 2e-5


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir(exist_ok=True)
    return parent / name


def run(checkpoint: Path, **more: Any) -> torch.Tensor:
    return joined(denoise_in_threads(checkpoint, **{**CASE, "texts": some_texts(), **more}))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("layout", [as_diffusers, as_original])
def test_it_is_the_change_of_a_merged_one(tiny: Path, tmp_path: Path, layout: Callable[[], Any], ranks: int) -> None:
    loras = find_loras([f"{write(tmp_path, layout())}:0.7"], 1)
    plain, found = run(tiny, ranks=ranks), run(tiny, ranks=ranks, beside=loras)
    merged = run(tiny, ranks=ranks, loras=loras)
    assert (plain - merged).abs().max() > 0.01, "the LoRA makes no difference"
    assert (found - merged).abs().max() <= TOLERANCE


def test_without_them_the_bits_are_those_of_a_fresh_engine(tiny: Path, tmp_path: Path) -> None:
    one = find_loras([str(write(folder(tmp_path, "a"), as_original()))], 1)
    other = find_loras([str(write(folder(tmp_path, "b"), as_diffusers(seed=4)))], 1)
    before = run(tiny, ranks=2)
    with_one = run(tiny, ranks=2, beside=one)
    run(tiny, ranks=2, beside=other)
    assert torch.equal(run(tiny, ranks=2), before)
    assert torch.equal(run(tiny, ranks=2, beside=one), with_one), "switched back"
    assert not torch.equal(with_one, before)


def test_several_at_once_on_any_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    specs = [f"{write(folder(tmp_path, 'a'), as_original())}:0.5", f"{write(folder(tmp_path, 'b'), as_diffusers(seed=4))}:-0.3"]
    loras = find_loras(specs, 1)
    found = [run(tiny, ranks=ranks, beside=loras, rules=Rules(context="cached")) for ranks in (1, 3)]
    assert torch.equal(*found)
    assert (found[0] - run(tiny, loras=loras, rules=Rules(context="cached"))).abs().max() <= TOLERANCE
    alone = run(tiny, beside=loras[:1], rules=Rules(context="cached"))
    assert (found[0] - alone).abs().max() > 1e-3


def test_each_expert_has_its_own(tiny_two: Path, tmp_path: Path) -> None:
    path = write(tmp_path, as_diffusers(num_layers=3))
    case: dict[str, Any] = {"flow_shift": 5.0, "boundary_ratio": 0.875, "solver": "euler"}
    found = {}
    for spec in (f"high:{path}", f"low:{path}:0.6", str(path)):
        loras = find_loras([spec], 2)
        found[spec] = run(tiny_two, beside=loras, **case)
        assert (found[spec] - run(tiny_two, loras=loras, **case)).abs().max() <= TOLERANCE
        assert torch.equal(found[spec], run(tiny_two, beside=loras, ranks=3, **case))
    first, second, both = found.values()
    assert not torch.equal(first, second) and not torch.equal(first, both)


def test_with_weights_in_eight_bits_and_layers_that_wait(tiny: Path, tmp_path: Path) -> None:
    """On the CPU offloading finds nothing to move, its hooks run all the same."""
    loras = find_loras([str(write(tmp_path, as_original()))], 1)
    assert torch.equal(run(tiny, beside=loras, is_offloaded=True), run(tiny, beside=loras))
    plain, found = run(tiny, quantization="fp8"), run(tiny, quantization="fp8", beside=loras)
    assert found.isfinite().all() and (found - plain).abs().max() > 0.01
    assert torch.equal(run(tiny, quantization="fp8"), plain)


def test_in_half_precision_it_is_near_the_merged_one(tiny: Path, tmp_path: Path) -> None:
    loras = find_loras([str(write(tmp_path, as_original()))], 1)
    exact, merged = run(tiny, loras=loras), run(tiny, loras=loras, dtype="bfloat16")
    found = run(tiny, beside=loras, dtype="bfloat16")
    assert (found - exact).abs().mean() < 2 * (merged - exact).abs().mean()


def test_a_file_of_no_numbers_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    state = as_diffusers()
    state["transformer.blocks.2.attn1.to_q.lora_A.weight"][0, 0] = float("nan")
    good, bad = (find_loras([str(write(folder(tmp_path, name), s))], 1) for name, s in (("a", as_diffusers()), ("b", state)))
    stage = Stage(Checkpoint(tiny), range(4), dtype="float32", device="cpu")
    stage.use_loras(good)
    assert stage._beside.num_bytes > 0
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn1\.to_q\.lora_A\.weight holds NaN"):
        stage.use_loras(bad)
    assert stage._beside.num_bytes == 0 and not any(m._forward_hooks for m in stage.models[0].modules())
    Path(bad[0].file).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stage.use_loras(bad)


def test_what_was_read_is_kept_up_to_its_limit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualparal.model import lora_beside

    specs = [find_loras([str(write(folder(tmp_path, name), as_diffusers(seed=n)))], 1) for n, name in enumerate("abc")]
    reads = []
    plain = lora_beside._read
    monkeypatch.setattr(lora_beside, "_read", lambda lora, wanted: reads.append(lora.file) or plain(lora, wanted))
    stage = Stage(Checkpoint(tiny), range(4), dtype="float32", device="cpu", lora_cache_bytes=10**9)
    stage.use_loras(specs[0])
    one = stage._beside._cache.num_bytes
    assert one == sum(x.numel() * 4 for x in as_diffusers().values())
    stage._beside._cache.max_bytes = 2 * one
    for which in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, and 1 that of 2
        stage.use_loras(specs[which])
    assert [Path(file).parent.name for file in reads] == ["a", "b", "c", "b"]
    assert stage._beside._cache.num_bytes == 2 * one
    write(folder(tmp_path, "a"), as_diffusers(seed=9))  # in its place
    stage.use_loras(specs[0])
    assert len(reads) == 5
    assert LoraCache(0).num_bytes == 0


def test_a_stage_reads_its_own_layers_only(tiny: Path, tmp_path: Path) -> None:
    (lora,) = find_loras([str(write(tmp_path, as_original()))], 1)
    stage = Stage(Checkpoint(tiny), range(1, 3), dtype="float32", device="cpu", lora_cache_bytes=10**9)
    stage.use_loras([lora])
    (kept,) = stage._beside._cache._kept.values()
    assert {name.split(".")[1] for name in kept} == {"1", "2"}
    assert isinstance(stage._beside, LorasBeside)
