"""8-bit weights and layers in host memory: what is stored, what it changes, and that ranks still agree on every bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import group_offloading

from dualparal import Engine, RequestError, devices
from dualparal import options as engine_options
from dualparal.cli.main import main
from dualparal.model import checkpoint as checkpoint_module
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.low_memory import FP8, stored_bytes
from dualparal.model.stage import Stage
from dualparal.model.weights import read_tensors
from dualparal.planning.sizes import DiTSizes
from tests.local_ring import denoise_in_threads
from tests.texts import joined, some_texts

CASE: dict[str, Any] = dict(latents_num=7, num_per_block=2, num_cat=1, steps=3, texts=some_texts())
has_torchao = importlib.util.find_spec("torchao") is not None
KINDS = ["fp8", pytest.param("int8", marks=pytest.mark.skipif(not has_torchao, reason="torchao is not installed"))]


def stage(folder: Path, layers: range = range(4), dtype: str = "float32", **options: Any) -> Stage:
    return Stage(Checkpoint(folder), layers, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_stores_what_diffusers_stores(tiny: Path, dtype: str) -> None:
    """The same parameters, cast the same way, as `enable_layerwise_casting` of the whole model."""
    upstream = WanTransformer3DModel.from_pretrained(tiny / "transformer", dtype=getattr(torch, dtype))
    upstream.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=getattr(torch, dtype))
    expected = dict(upstream.named_parameters())
    assert {value.dtype for value in expected.values()} >= {FP8, torch.float32}
    seen = set()
    for layers in (range(1), range(1, 4)):
        for name, value in stage(tiny, layers, dtype, quantization="fp8").models[0].named_parameters():
            assert value.dtype == expected[name].dtype, name
            assert torch.equal(value.float(), expected[name].float()), name
            seen.add(name)
    assert seen == set(expected)


def test_layers_are_pinned_one_tensor_after_another(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next is read, so that the layers are never in host memory twice; the rest goes to the device anyway."""
    order: list[str] = []

    def reading(infos: Any) -> Any:
        for key, value in read_tensors(infos):
            order.append(key)
            yield key, value

    def pinned(value: torch.Tensor) -> torch.Tensor:
        order.append("pinned")
        return value.clone()

    monkeypatch.setattr(checkpoint_module, "read_tensors", reading)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    load: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load_transformer_share(Checkpoint(tiny), "transformer", range(2), **load, is_pinned=True)
    assert order.count("pinned") == sum(name.startswith("blocks.") for name, _ in model.named_parameters()) > 0
    assert all(order[at - 1].startswith("blocks.") for at, what in enumerate(order) if what == "pinned")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_plan(tiny: Path, kind: str, dtype: str) -> None:
    sizes = DiTSizes.of(Checkpoint(tiny).config("transformer"))
    for layers in (range(2), range(2, 4), range(4)):
        held = stored_bytes(stage(tiny, layers, dtype, quantization=kind).models[0])
        assert held == sizes.share(layers).num_bytes(dtype, kind)
        assert held < sizes.share(layers).num_bytes(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_gives_the_same_bits(tiny: Path, kind: str) -> None:
    plain = joined(denoise_in_threads(tiny, **CASE))
    one = joined(denoise_in_threads(tiny, **CASE, quantization=kind))
    assert 0 < (plain - one).abs().max() < 0.5, "other numbers, near the same video"
    for ranks, split in ((2, None), (3, (1, 2, 1)), (4, None)):
        found = denoise_in_threads(tiny, **CASE, ranks=ranks, layer_split=split, quantization=kind, delay_seed=ranks)
        assert torch.equal(joined(found), one)


def test_two_experts_in_fp8(tiny_two: Path) -> None:
    case = {**CASE, "boundary_ratio": 0.875, "quantization": "fp8"}
    assert torch.equal(joined(denoise_in_threads(tiny_two, **case)), joined(denoise_in_threads(tiny_two, **case, ranks=3)))


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_offloaded_layers_give_the_same_bits(tiny: Path, kind: str | None) -> None:
    """On the CPU the hooks have nothing to move, but they run: the same layers in the same order."""
    plain = denoise_in_threads(tiny, **CASE, quantization=kind)
    found = denoise_in_threads(tiny, **CASE, ranks=2, quantization=kind, is_offloaded=True)
    assert torch.equal(joined(plain), joined(found))


def test_only_layers_wait_in_host_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the meta device in the GPU's place."""
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: None)
    found = Stage(Checkpoint(tiny), range(4), dtype="float32", device="meta", is_offloaded=True)
    for name, value in found.models[0].named_parameters():
        assert value.device.type == ("cpu" if name.startswith("blocks.") else "meta"), name


def test_layers_come_one_by_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[str, str]] = []
    for way in ("onload_", "offload_"):
        monkeypatch.setattr(
            group_offloading.ModuleGroup, way, lambda self, way=way: moves.append((way, type(self.modules[0]).__name__))
            if self.modules else None
        )  # fmt: skip
    denoise_in_threads(tiny, **{**CASE, "latents_num": 2, "steps": 1}, is_offloaded=True, layer_split=(4,))
    layer = [("onload_", "WanTransformerBlock"), ("offload_", "WanTransformerBlock")]
    assert moves[-8:] == layer * 4


def test_refused_before_any_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(RequestError) as caught:
            Engine(tiny, **{"device": "cpu", **options})
        assert caught.value.field in options
        return str(caught.value)

    assert "use fp8 or int8" in refused(quantization="int3")
    assert "without a GPU" in refused(offload=True)
    monkeypatch.setattr(engine_options.importlib.util, "find_spec", lambda name: None)
    assert "needs the package torchao" in refused(quantization="int8")
    monkeypatch.setattr(engine_options.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    assert "int8" in refused(offload=True, quantization="int8", device="cuda")
    assert "compile" in refused(offload=True, compile=True, device="cuda")
    assert Engine(tiny, device="cuda", offload=True, quantization="fp8").changes() == {"quantization": "fp8"}


def test_flags(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", "--prompt", "x", "--model_id", str(tiny), "--device", "cpu"]
    assert main([*generate, "--offload"]) == 2
    assert "without a GPU" in capsys.readouterr().err
    assert main([*generate, "--quantization", "fp8", "--baseline", "wan"]) == 2
    assert "--quantization out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*generate, "--quantization", "int2"])
