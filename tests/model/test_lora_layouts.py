"""Every layout of LoRA files that loads, its merge written out by hand; `docs/models.md` has the table made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from dualparal.errors import CheckpointError
from dualparal.model import lora_file
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_file import check_loras
from dualparal.model.lora_source import Lora, find_loras
from dualparal.model.part_shapes import transformer_shapes
from tests.model.test_lora import DIM, RANK, State, _original_name, fused, modules, random_pairs, write
from tests.tables import check_page, markdown

# name for people: (an example's key, module's spelling, (down, up), whether alphas go with it, whether diffusers loads it)
LAYOUTS: dict[str, tuple[Callable[[str], str], tuple[str, str], float | None, bool]] = {
    "diffusers": (lambda n: f"transformer.{n}", ("lora_A", "lora_B"), None, True),
    "PEFT's `save_pretrained`, with `adapter_config.json`": (
        lambda n: f"base_model.model.{n}", ("lora_A", "lora_B"), None, False,
    ),
    "no prefix": (lambda n: n, ("lora_A", "lora_B"), None, False),
    "original Wan, LightX2V": (lambda n: f"diffusion_model.{_original_name(n, '.')}", ("lora_down", "lora_up"), 1.5, True),
    "original Wan with PEFT's words": (lambda n: f"diffusion_model.{_original_name(n, '.')}", ("lora_A", "lora_B"), None, True),
    "DiffSynth": (lambda n: _original_name(n, "."), ("lora_A.default", "lora_B.default"), None, False),
    "DiffSynth, whole pipeline": (
        lambda n: f"pipe.dit.{_original_name(n, '.')}", ("lora_A.default", "lora_B.default"), None, False,
    ),
    "kohya, musubi-tuner": (lambda n: f"lora_unet_{_original_name(n, '_')}", ("lora_down", "lora_up"), 2.0, True),
    "kohya without alphas": (lambda n: f"lora_unet_{_original_name(n, '_')}", ("lora_down", "lora_up"), None, False),
    "VideoX-Fun": (lambda n: f"lora_unet__{_original_name(n, '_')}", ("lora_down", "lora_up"), 2.0, False),
}  # fmt: skip


def state_of(name: str) -> State:
    spell, (down_word, up_word), alpha, _ = LAYOUTS[name]
    state: State = {}
    for module, (down, up) in random_pairs().items():
        state |= {f"{spell(module)}.{down_word}.weight": down, f"{spell(module)}.{up_word}.weight": up}
        if alpha is not None:
            state[f"{spell(module)}.alpha"] = torch.tensor(alpha)
    return state


def merged(folder: Path, path: Path, scale: float = 1.0) -> State:
    model = load_transformer_share(
        Checkpoint(folder), "transformer", range(4), dtype=torch.float32, device=torch.device("cpu"),
        loras=find_loras([f"{path}:{scale}"], 1),
    )  # fmt: skip
    return model.state_dict()


def plain(folder: Path) -> State:
    model = load_transformer_share(Checkpoint(folder), "transformer", range(4), dtype=torch.float32, device=torch.device("cpu"))
    return model.state_dict()


@pytest.fixture(autouse=True)
def forget_files() -> None:
    lora_file._read_lora.cache_clear()


@pytest.mark.parametrize("name", LAYOUTS)
def test_merge_by_hand(tiny: Path, tmp_path: Path, name: str) -> None:
    alpha = LAYOUTS[name][2]
    path = write(tmp_path, state_of(name))
    if name.startswith("PEFT"):
        alpha = 6.0
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 6}))
    before, after = plain(tiny), merged(tiny, path, 0.5)
    for module, (down, up) in random_pairs().items():
        expected = before[f"{module}.weight"] + 0.5 * (1.0 if alpha is None else alpha / RANK) * (up @ down)
        torch.testing.assert_close(after[f"{module}.weight"], expected, rtol=0, atol=1e-6)
    changed = {f"{module}.weight" for module in modules()}
    assert all(torch.equal(after[key], before[key]) for key in before if key not in changed)


@pytest.mark.filterwarnings("ignore:.*peft.*", "ignore:.*Already found.*")
@pytest.mark.parametrize("name", [name for name, row in LAYOUTS.items() if row[3]])
def test_merge_as_diffusers(tiny: Path, tmp_path: Path, name: str) -> None:
    path = write(tmp_path, state_of(name))
    expected, found = fused(tiny, [(path, 0.7, False)]).transformer.state_dict(), merged(tiny, path, 0.7)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def head_diff() -> State:
    return {
        "diffusion_model.head.head.diff": torch.randn(16, DIM) * 0.1, "diffusion_model.head.head.diff_b": torch.randn(16),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.randn(DIM),
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.randn(RANK, DIM),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.randn(DIM, RANK),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*peft.*", "ignore:.*Already found.*")
def test_head_and_norms_as_diffusers(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, head_diff())
    expected, found = fused(tiny, [(path, 0.7, False)]).transformer.state_dict(), merged(tiny, path, 0.7)
    assert not torch.equal(found["proj_out.weight"], plain(tiny)["proj_out.weight"])
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_some_layers_only_and_two_spellings(tiny: Path, tmp_path: Path) -> None:
    down, up = torch.randn(RANK, DIM), torch.randn(DIM, RANK)
    path = write(tmp_path, {
        "lora_unet_blocks_3_cross_attn_o.lora_down.weight": down, "lora_unet_blocks_3_cross_attn_o.lora_up.weight": up,
        "transformer.blocks.1.ffn.net.2.lora_A.weight": torch.ones(1, 48),
        "transformer.blocks.1.ffn.net.2.lora_B.weight": torch.ones(DIM, 1),
        "patch_embedding.lora_A.weight": torch.ones(2, 4, 1, 2, 2),
        "patch_embedding.lora_B.weight": torch.ones(DIM, 2, 1, 1, 1),
        "blocks.0.attn1.to_k.lora_A.weight": torch.ones(1, DIM, 1, 1),
        "blocks.0.attn1.to_k.lora_B.weight": torch.ones(DIM, 1, 1, 1),
    })  # fmt: skip
    before, after = plain(tiny), merged(tiny, path)
    key = "blocks.3.attn2.to_out.0.weight"
    torch.testing.assert_close(after[key], before[key] + up @ down, rtol=0, atol=1e-6)
    for key, delta in (("blocks.1.ffn.net.2.weight", 1), ("patch_embedding.weight", 2), ("blocks.0.attn1.to_k.weight", 1)):
        torch.testing.assert_close(after[key], before[key] + delta, rtol=0, atol=1e-6)


Q = "transformer.blocks.0.attn1.to_q"
O = "diffusion_model.blocks.0.self_attn.q"  # noqa: E741


def pair(rank: int = RANK, base: str = Q, words: tuple[str, str] = ("lora_A", "lora_B")) -> State:
    return {f"{base}.{words[0]}.weight": torch.ones(rank, DIM), f"{base}.{words[1]}.weight": torch.ones(DIM, rank)}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({f"{Q}.lora_A.weight": torch.zeros(3, DIM), f"{Q}.lora_B.weight": torch.zeros(DIM, 4)}, "lora_A.weight has rank 3"),
        (pair(0), "to_q.lora_A.weight has rank 0"),
        (pair() | {f"{Q}.lora_B.bias": torch.ones(1)}, r"to_q.lora_B.bias of shape \[1\]"),
        ({"transformer.blocks.0.ffn.net.0.proj.lora_A.weight": torch.ones(3, 48),
          "transformer.blocks.0.ffn.net.0.proj.lora_B.weight": torch.ones(24, 3)}, "net.0.proj.lora_A.weight of shape"),
        ({f"{Q}.lora_A.weight": torch.ones(3), f"{Q}.lora_B.weight": torch.ones(DIM, 3)}, "have|has the shape"),
        (pair() | {f"{O}.lora_down.weight": torch.ones(3, DIM)}, "two changes of the same"),
        ({"diffusion_model.blocks.0.norm3.diff": torch.zeros(DIM)}, "changes nothing: diffusion_model.blocks.0.norm3.diff"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "to_q.alpha and no weights"),
        ({key: value.to(torch.int32) for key, value in pair().items()}, "lora_A.weight is stored as I32"),
        ({key.replace("transformer", "transformer_2"): value for key, value in pair().items()}, "transformer_2.*does not have"),
        (pair() | {f"{Q}.alpha": torch.ones(2)}, "to_q.alpha holds 2 numbers"),
        *[(pair(base=O) | {f"{O}.alpha": torch.tensor(alpha)}, f"self_attn.q.alpha is {alpha:g}")
          for alpha in (0.0, -1.0, float("nan"), float("inf"))],
    ],
)  # fmt: skip
def test_refused_before_any_work(tiny: Path, tmp_path: Path, state: State, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        check_loras(
            [Lora("a LoRA", str(write(tmp_path, state)))], 1, transformer_shapes(Checkpoint(tiny).config("transformer"))
        )
    assert any(key in str(caught.value) for key in state), "it names no key of the file"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_dtypes(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in pair(base=O).items()} | {f"{O}.alpha": torch.tensor(6.0).to(torch.bfloat16)}
    key = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(merged(tiny, write(tmp_path, state))[key], plain(tiny)[key] + 6.0, rtol=0, atol=1e-5)


def test_not_a_number_is_named(tiny: Path, tmp_path: Path) -> None:
    state = pair() | {f"{Q}.lora_A.weight": torch.full((RANK, DIM), float("nan"))}
    with pytest.raises(CheckpointError, match=r"to_q\.lora_A\.weight holds NaN"):
        merged(tiny, write(tmp_path, state))


def test_settings_of_peft(tiny: Path, tmp_path: Path) -> None:
    state = pair(base="base_model.model.blocks.0.attn1.to_q") | pair(2, base="base_model.model.blocks.1.attn1.to_q")
    path = write(tmp_path, state)
    settings = {
        "r": RANK,
        "lora_alpha": 6,
        "rank_pattern": {"blocks.1.attn1.to_q": 2},
        "alpha_pattern": {"blocks.1.attn1.to_q": 8},
    }
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps(settings))
    before, after = plain(tiny), merged(tiny, path)
    for number, delta in ((0, 6 / RANK * RANK), (1, 8 / 2 * 2)):
        key = f"blocks.{number}.attn1.to_q.weight"
        torch.testing.assert_close(after[key], before[key] + delta, rtol=0, atol=1e-5)
    for wrong, says in (
        ({"r": 5}, "has rank 3, the adapter's settings say 5"), ({"lora_alpha": -1}, "lora_alpha of .* is -1"),
        ({"use_dora": True}, "is a DoRA"), ({"peft_type": "LOKR"}, "not a LoRA"), ({"rank_pattern": {"(": 1}}, "make no sense"),
    ):  # fmt: skip
        beside.write_text(json.dumps(settings | wrong))
        lora_file._read_lora.cache_clear()
        with pytest.raises(CheckpointError, match=says):
            merged(tiny, path)


def test_the_docs_have_the_table() -> None:
    rows = []
    for name, (spell, words, alpha, _) in LAYOUTS.items():
        said = "`.alpha` of each module" if alpha is not None else "`lora_alpha` of the settings, else its rank"
        rows.append([name, f"`{spell('blocks.0.attn1.to_q')}.{words[0]}.weight`", said])
    check_page("models.md", markdown(["layout", "a key", "alpha"], rows))


def test_diffusers_would_not_load_the_others() -> None:
    """So that a later diffusers that does moves them to the comparison above."""
    for name, row in LAYOUTS.items():
        if not row[3] and name.startswith(("kohya", "VideoX")):
            with pytest.raises((KeyError, IndexError, ValueError)):
                WanPipeline.lora_state_dict(state_of(name))
