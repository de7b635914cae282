"""8-bit weights with scales: every part of a checkpoint loads as the same checkpoint dequantised by hand, bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualparal import Engine
from dualparal.errors import CheckpointError
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.tiny import write_tiny_checkpoint
from dualparal.model.validation import validate
from dualparal.model.weights import load_text_encoder, load_vae
from dualparal.planning.layer_split import split_layers
from dualparal.request import GenerationRequest
from dualparal.ring.baseline_process import load_pipeline

State = dict[str, torch.Tensor]
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
MOST = {FP8: 448.0, FP8_WIDE: 57344.0, torch.int8: 127.0}


def quantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored, what it stands for), with `scale` spread over the weight."""
    ratio = (weight / scale).clamp(-MOST[dtype], MOST[dtype])
    stored = (ratio.round() if dtype == torch.int8 else ratio).to(dtype)
    return stored, stored.float() * scale


def per_tensor(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / MOST[dtype]
    return (*quantised(weight, scale, dtype), scale)


def per_channel(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.flatten(1).abs().amax(1) / MOST[dtype]
    return (*quantised(weight, scale.view(-1, *[1] * (weight.ndim - 1)), dtype), scale)


def by_blocks(rows: int, columns: int) -> Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, ...]]:
    def make(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        spread = torch.empty_like(weight)
        for i, stripe in enumerate(weight.split(rows)):
            for j, block in enumerate(stripe.split(columns, 1)):
                scale[i, j] = block.abs().max() / MOST[dtype]
                spread[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = scale[i, j]
        return *quantised(weight, spread, dtype), scale

    return make


# What is written: (a weight's dtype, how it is scaled, the scale's name and shape, markers beside it)
Kind = tuple[torch.dtype, Callable[..., tuple[torch.Tensor, ...]], str, Callable[[torch.Tensor], torch.Tensor], State]
KINDS: dict[str, Kind] = {
    "ComfyUI": (FP8, per_tensor, "scale_weight", lambda s: s.view(1), {"scaled_fp8": torch.zeros(2, dtype=FP8)}),
    "ComfyUI, e5m2": (FP8_WIDE, per_tensor, "scale_weight", lambda s: s, {"scaled_fp8": torch.zeros(0)}),
    "per channel": (FP8, per_channel, "weight_scale", lambda s: s.view(-1, 1), {}),
    "per channel, flat": (FP8, per_channel, "scale_weight", lambda s: s, {}),
    "int8": (torch.int8, per_channel, "weight_scale", lambda s: s.view(-1, 1), {}),
    "DeepSeek": (FP8, by_blocks(128, 128), "weight_scale_inv", lambda s: s, {}),
    "groups": (torch.int8, by_blocks(1, 8), "weight_scale", lambda s: s, {}),
    "musubi-tuner": (FP8, by_blocks(1, 8), "scale_weight", lambda s: s.unsqueeze(-1), {"scaled_fp8": torch.zeros(0)}),
}


def write_scaled(folder: Path, plain: Path, part: str, kind: Kind) -> None:
    """Both forms of `part`: scaled in `folder`, and as float32 numbers in `plain`."""
    dtype, scale, name, shape, markers = kind
    state, whole = load_file(folder / FILES[part]), load_file(folder / FILES[part])
    for key, weight in whole.items():
        is_matrix = weight.ndim == 2 or (weight.ndim > 2 and scale in (per_tensor, per_channel))
        if not key.endswith(".weight") or not is_matrix or (name == "groups" and weight.shape[1] % 8):
            continue
        stored, meant, number = scale(weight, dtype)
        base = key.removesuffix(".weight")
        state[key], whole[key] = stored, meant
        state[f"{base}.{name}"] = shape(number).clone()
        state[f"{base}.scale_input"] = torch.ones(1)
    assert len(state) > len(whole), "nothing was scaled"
    save_file({**state, **markers}, folder / FILES[part], {"format": "pt"})
    save_file(whole, plain / FILES[part], {"format": "pt"})


def load(folder: Path, part: str, dtype: torch.dtype) -> State:
    checkpoint = Checkpoint(folder)
    validate(checkpoint)
    if part == "vae":
        return dict(load_vae(checkpoint, dtype).state_dict())
    if part == "text_encoder":
        return dict(load_text_encoder(checkpoint, dtype).state_dict())
    found: State = {}
    for layers in split_layers(checkpoint.num_layers, 2):
        share = load_transformer_share(checkpoint, part, layers, dtype=dtype, device=torch.device("cpu"))
        found |= dict(share.named_parameters())
    return found


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices larger than a block of 128 x 128, and no multiple of it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "m", num_heads=6, head_dim=24, ffn_dim=272, num_layers=2)


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name, kind in KINDS.items() for part in FILES if part != "vae" or kind[1] in (per_tensor, per_channel)],
)
def test_equal_to_the_dequantised_checkpoint(wide: Path, tmp_path: Path, part: str, name: str) -> None:
    scaled, plain = (Path(shutil.copytree(wide, tmp_path / name)) for name in ("scaled", "plain"))
    write_scaled(scaled, plain, part, KINDS[name])
    for dtype in (torch.float32, torch.bfloat16):
        expected, found = load(plain, part, dtype), load(scaled, part, dtype)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def test_a_block_size_of_the_config(wide: Path, tmp_path: Path) -> None:
    scaled, plain = (Path(shutil.copytree(wide, tmp_path / name)) for name in ("scaled", "plain"))
    write_scaled(scaled, plain, "transformer", (FP8, by_blocks(64, 32), "weight_scale_inv", lambda s: s, {}))
    with pytest.raises(CheckpointError, match="which is no scale of"):
        load(scaled, "transformer", torch.float32)
    file = scaled / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"weight_block_size": [64, 32]}}))
    found, expected = load(scaled, "transformer", torch.float32), load(plain, "transformer", torch.float32)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_scales_in_another_shard_and_under_the_other_name(tiny: Path, tmp_path: Path) -> None:
    """UMT5's embedding table has two names, and an index may put a scale anywhere."""
    scaled, plain = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("scaled", "plain"))
    write_scaled(scaled, plain, "text_encoder", KINDS["per channel"])
    state = load_file(scaled / FILES["text_encoder"])
    state = {key.replace("shared.", "encoder.embed_tokens."): value for key, value in state.items()}
    shards = {"a.safetensors": {}, "b.safetensors": {}}  # type: dict[str, State]
    for key, value in state.items():
        shards["b.safetensors" if "scale" in key else "a.safetensors"][key] = value
    for name, shard in shards.items():
        save_file(shard, scaled / "text_encoder" / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (scaled / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    found, expected = load(scaled, "text_encoder", torch.float32), load(plain, "text_encoder", torch.float32)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_types_of_scales(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    state = load_file(folder / FILES["transformer"])
    key = "blocks.1.ffn.net.2"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(FP8)
    save_file({**state, f"{key}.weight_scale": torch.tensor([0.25]).to(dtype)}, folder / FILES["transformer"], {"format": "pt"})
    assert torch.equal(load(folder, "transformer", torch.float32)[f"{key}.weight"], state[f"{key}.weight"].float() * 0.25)


# What makes no sense


KEY = "blocks.1.attn1.to_q"


def change(part: str, **values: object) -> Callable[[State], None]:
    """`values` under the ends of `KEY`'s name; None takes one away."""

    def make(state: State) -> None:
        for end, value in values.items():
            name = end.replace("__", ".") if "__" in end else f"{KEY}.{end}"
            if value is None:
                del state[name]
            else:
                state[name] = value  # type: ignore[assignment]

    return make


def quant_format(**values: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


BAD: dict[str, tuple[Callable[[State], None], str]] = {
    "another shape": (change("transformer", scale_weight=torch.ones(7)), rf"{KEY}\.scale_weight has the shape \[7\]"),
    "of the inputs": (change("transformer", weight_scale=torch.ones(1, 24)), r"weight_scale has the shape"),
    "without its weight": (change("transformer", blocks__9__x__scale_weight=torch.ones(1)), "blocks.9.x.scale_weight is the"),
    "two of them": (change("transformer", scale_weight=torch.ones(1), weight_scale=torch.ones(1)), "are scales of one weight"),
    "whole numbers": (change("transformer", scale_weight=torch.ones(1, dtype=torch.int32)), "scale_weight is stored as I32"),
    "rotated": (change("transformer", comfy_quant=quant_format(format="int8_tensorwise", convrot=True)), "comfy_quant says"),
    "packed": (change("transformer", comfy_quant=quant_format(format="nvfp4")), "comfy_quant says"),
    "no format": (change("transformer", comfy_quant=torch.tensor([1], dtype=torch.uint8)), "comfy_quant says"),
    "int8 without": (change("transformer", weight=torch.ones(24, 24, dtype=torch.int8)), "is stored as I8 without a scale"),
    "packed by two": (change("transformer", weight=torch.ones(24, 12, dtype=torch.uint8), weight_scale=torch.ones(1)),
                      "is stored as U8, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_before_any_work(tiny: Path, tmp_path: Path, name: str) -> None:
    make, says = BAD[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    state = load_file(folder / FILES["transformer"])
    make(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / FILES["transformer"], {"format": "pt"})
    with pytest.raises(CheckpointError, match=says) as caught:
        Engine(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", FILES)
def test_a_scale_that_is_no_number(tiny: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    state = load_file(folder / FILES[part])
    key = max(key for key, value in state.items() if key.endswith(".weight") and value.ndim > 1)
    name = f"{key.removesuffix('.weight')}.scale_weight"
    save_file({**state, name: torch.tensor(float("nan"))}, folder / FILES[part], {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN"):
        load(folder, part, torch.float32)


def test_what_is_left_out_is_told(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    state = load_file(folder / FILES["transformer"])
    state |= {f"{KEY}.scale_input": torch.ones(1), f"{KEY}.comfy_quant": quant_format(format="float8_e4m3fn")}
    save_file(state, folder / FILES["transformer"], {"format": "pt"})
    with caplog.at_level(logging.DEBUG):
        validate(Checkpoint(folder))
    assert f"{KEY}.scale_input concerns no weight" in caplog.text


def test_the_baseline_applies_them_too(tiny: Path, tmp_path: Path) -> None:
    """diffusers would read the stored numbers as they are."""
    scaled, plain = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("scaled", "plain"))
    for part in FILES:
        write_scaled(scaled, plain, part, KINDS["ComfyUI"])
    request = GenerationRequest(prompt="x", flow_shift=3.0)
    found, expected = (load_pipeline(folder, "bfloat16", "float32", request) for folder in (scaled, plain))
    for part in FILES:
        state = getattr(found, part).state_dict()
        for key, value in getattr(expected, part).state_dict().items():
            assert state[key].dtype == value.dtype and torch.equal(state[key], value), f"{part}: {key}"
