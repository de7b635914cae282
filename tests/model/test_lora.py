"""LoRA files of every format, merged stage by stage, against diffusers' own loading and fusing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from dualparal.errors import CheckpointError, RequestError
from dualparal.model import lora as lora_module
from dualparal.model import lora_file
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_file import check_loras
from dualparal.model.lora_source import Lora, find_loras
from tests.local_ring import denoise_in_threads
from tests.model.test_one_block import TOLERANCE, run_pipeline
from tests.texts import joined, some_texts

DIM, FFN, TEXT_DIM, FREQ_DIM, RANK = 24, 48, 32, 32, 3
ORIGINAL = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
State = dict[str, torch.Tensor]


def modules(num_layers: int = 4) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers a LoRA may change, in diffusers' names."""
    found = {
        f"blocks.{n}.{attn}.{part}": (DIM, DIM) for n in range(num_layers) for attn in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }  # fmt: skip
    for n in range(num_layers):
        found |= {f"blocks.{n}.ffn.net.0.proj": (DIM, FFN), f"blocks.{n}.ffn.net.2": (FFN, DIM)}
    return found


def random_pairs(seed: int = 0, num_layers: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(RANK, i, generator=generator) * 0.2, torch.randn(o, RANK, generator=generator) * 0.2)
        for name, (i, o) in modules(num_layers).items()
    }


def as_diffusers(seed: int = 0, component: str = "transformer", num_layers: int = 4) -> State:
    state = {}
    for name, (down, up) in random_pairs(seed, num_layers).items():
        state |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
    return state


def _original_name(name: str, joint: str) -> str:
    _, number, *rest = name.split(".", 2)
    inner = rest[0]
    if inner.startswith("ffn"):
        inner = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}[inner]
    else:
        attn, part = inner.split(".", 1)
        inner = f"{ORIGINAL[attn]}.{ORIGINAL[part]}"
    return f"blocks.{number}.{inner}".replace(".", joint)


def as_original(seed: int = 0, words: tuple[str, str] = ("lora_down", "lora_up"), alpha: float | None = 1.5) -> State:
    """Keys of the original Wan code, as most published LoRAs have them, with biases of their own and no alpha for some."""
    state = {}
    for number, (name, (down, up)) in enumerate(random_pairs(seed).items()):
        base = f"diffusion_model.{_original_name(name, '.')}"
        state |= {f"{base}.{words[0]}.weight": down, f"{base}.{words[1]}.weight": up}
        state[f"{base}.diff_b"] = torch.full((up.shape[0],), 0.01 * (number % 5))
        if alpha is not None and number % 3:
            state[f"{base}.alpha"] = torch.tensor(alpha)
    generator = torch.Generator().manual_seed(seed + 1)
    for base, inputs, outputs in (
        ("time_projection.1", DIM, 6 * DIM), ("head.head", DIM, 16), ("text_embedding.0", TEXT_DIM, DIM),
        ("text_embedding.2", DIM, DIM), ("time_embedding.0", FREQ_DIM, DIM), ("time_embedding.2", DIM, DIM),
    ):  # fmt: skip
        state[f"diffusion_model.{base}.{words[0]}.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.1
        state[f"diffusion_model.{base}.{words[1]}.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.1
    return state


def as_kohya(seed: int = 0) -> State:
    state = {}
    for name, (down, up) in random_pairs(seed).items():
        base = f"lora_unet_{_original_name(name, '_')}"
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(2.0)}
    return state


def write(folder: Path, state: State, name: str = "lora.safetensors", metadata: dict[str, Any] | None = None) -> Path:
    path = folder / name
    about = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({key: value.contiguous() for key, value in state.items()}, path, about)
    return path


def fused(folder: Path, loras: list[tuple[Path, float, bool]]) -> WanPipeline:
    """diffusers' own: (file, scale, whether for transformer_2)."""
    pytest.importorskip("peft")
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for number, (path, scale, for_second) in enumerate(loras):
        component = "transformer_2" if for_second else "transformer"
        name = f"lora{number}"
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=name, load_into_transformer_2=for_second
        )
        pipeline.fuse_lora(components=[component], lora_scale=scale, adapter_names=[name])
        pipeline.unload_lora_weights()
    return pipeline


def difference(
    folder: Path, pipeline: WanPipeline, specs: list[str], ranks: int = 2, num_experts: int = 1, guidance: float = 5.0
) -> float:
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    texts = some_texts(guided=guidance > 1)
    expected = run_pipeline(pipeline, noise, texts[0], 4, (guidance, guidance))
    found = joined(
        denoise_in_threads(
            folder, latents_num=3, num_per_block=3, num_cat=1, steps=4, texts=texts, guidance=(guidance, guidance), ranks=ranks,
            boundary_ratio=pipeline.config.boundary_ratio, noise=[noise], loras=find_loras(specs, num_experts),
        )
    )  # fmt: skip
    return (found - expected).abs().max().item()


@pytest.fixture(autouse=True)
def forget_files() -> None:
    lora_file._read_lora.cache_clear()


FORMATS: dict[str, Callable[[], State]] = {
    "diffusers": as_diffusers, "original": as_original, "kohya": as_kohya,
    "original, lora_A": lambda: as_original(words=("lora_A", "lora_B"), alpha=None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*peft.*", "ignore:.*Already found.*")
@pytest.mark.parametrize("name", FORMATS)
def test_one_file(tiny: Path, tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMATS[name]())
    pipeline = fused(tiny, [(path, 0.7, False)])
    plain = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    assert difference(tiny, plain, [f"{path}:0.7"]) > 0.01, "the LoRA changes nothing"
    assert difference(tiny, pipeline, [f"{path}:0.7"]) <= TOLERANCE


@pytest.mark.parametrize("ranks", [1, 4])
def test_two_files_without_guidance(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """As step-distilled LoRAs are used: few steps, guidance 1."""
    one, two = write(tmp_path, as_diffusers(1), "a.safetensors"), write(tmp_path, as_kohya(2), "b.safetensors")
    pipeline = fused(tiny, [(one, 1.0, False), (two, -0.5, False)])
    assert difference(tiny, pipeline, [str(one), f"{two}:-0.5"], ranks=ranks, guidance=1.0) <= TOLERANCE


def test_alpha_and_rank_of_a_peft_adapter(tiny: Path, tmp_path: Path) -> None:
    metadata = {
        "transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn1.to_q": 2},
        "transformer.rank_pattern": {}, "transformer.use_rslora": False,
        "transformer.target_modules": sorted({name.split(".", 2)[2] for name in modules()}),
    }  # fmt: skip
    path = write(tmp_path, as_diffusers(), metadata=metadata)
    assert difference(tiny, fused(tiny, [(path, 1.0, False)]), [str(path)]) <= TOLERANCE


def test_two_experts(tiny_two: Path, tmp_path: Path) -> None:
    high = write(tmp_path, as_diffusers(1, num_layers=3), "high_noise_model.safetensors")
    low = write(tmp_path, as_diffusers(2, num_layers=3), "low_noise_model.safetensors")
    pipeline = fused(tiny_two, [(high, 0.5, False), (low, 0.5, True)])
    assert difference(tiny_two, pipeline, [f"{tmp_path}:0.5"], num_experts=2, guidance=1.0) <= TOLERANCE
    both = write(tmp_path, {**as_diffusers(1, num_layers=3), **as_diffusers(2, "transformer_2", 3)}, "both.safetensors")
    assert difference(tiny_two, pipeline, [f"{both}:0.5"], num_experts=2, guidance=1.0) <= TOLERANCE
    same = fused(tiny_two, [(high, 1.0, False), (high, 1.0, True)])
    plain = write(tmp_path, as_diffusers(1, num_layers=3), "plain.safetensors")
    assert difference(tiny_two, same, [str(plain)], num_experts=2, guidance=1.0) <= TOLERANCE


def test_only_own_keys_are_read(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = lora_module._read
    monkeypatch.setattr(lora_module, "_read", lambda lora, sources: read.extend(sources) or original(lora, sources))
    loras = find_loras([str(write(tmp_path, as_original(alpha=1.0)))], 1)
    load_transformer_share(
        Checkpoint(tiny), "transformer", range(1, 3), dtype=torch.bfloat16, device=torch.device("cpu"), loras=loras
    )
    assert read and all(source.key.split(".")[2] in ("1", "2") for source in read)


def test_merged_in_float32_then_cast(tiny: Path, tmp_path: Path) -> None:
    loras = find_loras([str(write(tmp_path, as_diffusers()))], 1)
    options: dict[str, Any] = {"device": torch.device("cpu"), "loras": loras}
    exact = load_transformer_share(Checkpoint(tiny), "transformer", range(4), dtype=torch.float32, **options)
    half = load_transformer_share(Checkpoint(tiny), "transformer", range(4), dtype=torch.bfloat16, **options)
    weight = exact.blocks[0].attn1.to_q.weight
    assert torch.equal(half.blocks[0].attn1.to_q.weight, weight.to(torch.bfloat16))


def test_what_diffusers_leaves_out_is_told(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = as_original() | {"diffusion_model.blocks.0.norm3.diff": torch.zeros(DIM)}
    with caplog.at_level(logging.WARNING):
        lora_file.read_lora(str(write(tmp_path, state)), "a LoRA")
    assert "a LoRA: 1 tensors are left out, as in diffusers (diffusion_model.blocks.0.norm3.diff)" in caplog.text


# Refusals


def merge(tiny: Path, path: Path) -> None:
    load_transformer_share(
        Checkpoint(tiny), "transformer", range(4), dtype=torch.float32, device=torch.device("cpu"),
        loras=[Lora("a LoRA", str(path))],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (as_diffusers(num_layers=5), r"transformer\.blocks\.4\.\S+\.weight, the weight of \S+, which this model does not have"),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, DIM)}, "only one of lora_A and lora_B"),
        ({"transformer.blocks.0.attn1.to_q.hada_w1": torch.zeros(3)}, "hada_w1 .* no part of a LoRA known here"),
        ({"diffusion_model.blocks.0.strange.weight": torch.zeros(1)}, r"strange\.weight .* no part"),
        ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(3, DIM)}, "q.lora_down.weight has no other half"),
        (
            {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, DIM + 1),
             "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(DIM, 3)},
            "lora_A.weight of shape .* changes a weight of 25, the model's has 24",
        ),
    ],
)  # fmt: skip
def test_unknown_keys(tiny: Path, tmp_path: Path, state: State, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        merge(tiny, write(tmp_path, state))
    assert any(key in str(caught.value) for key in state), "it names no key of the file"


def test_bad_specs(tmp_path: Path) -> None:
    good = write(tmp_path, as_diffusers())
    for spec, says in ((f"{good}:much", "is not a scale"), (f"{good}:nan", "a number from"), (f"{good}:1e9", "a number from")):
        with pytest.raises(RequestError, match=says):
            find_loras([spec], 1)
    (tmp_path / "lora.bin").write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path, as_diffusers(), "other.safetensors")
    strange = write(tmp_path / "empty", {"unet.x": torch.zeros(1)})
    dora = write(empty, {"transformer.x.dora_scale": torch.zeros(1)}, "dora.safetensors")
    for spec, says in (
        (str(tmp_path / "lora.bin"), "only safetensors are read"), (str(tmp_path), "2 LoRA files"),
        ("./nothing", "there is no LoRA"),
        (str(strange), r"does not look like a LoRA of a Wan transformer: it holds unet\.x"), (str(dora), "is a DoRA"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=says):
            check_loras(find_loras([spec], 1), 1, {})


def test_labels_find_the_same_files_again(tmp_path: Path) -> None:
    path = write(tmp_path, as_diffusers())
    loras = find_loras([f"{tmp_path}:0.25"], 2)
    assert [lora.label for lora in loras] == [f"{path}:0.25"] and loras[0].experts == (0, 1)
    assert find_loras([loras[0].label], 2) == loras
