"""Every layout of a checkpoint's files that loads, as the same numbers; `docs/models.md` has the table made from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from dualparal import CheckpointError
from dualparal.model.layout import Checkpoint
from dualparal.model.parts import PARTS
from dualparal.model.validation import validate
from tests.model.test_scales import FILES, FP8, FP8_WIDE, KINDS, State, load, write_scaled
from tests.tables import check_page, markdown

CLASSES = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
SPELT = {FP8: "float8 e4m3", FP8_WIDE: "float8 e5m2", torch.int8: "int8"}


@dataclass(frozen=True)
class Layout:
    """`write(folder, plain)` changes a copy of the tiny checkpoint to the layout and another to what its numbers mean."""

    shown: str
    write: Callable[[Path, Path], None]
    parts: tuple[str, ...] = tuple(FILES)


def rewrite(change: Callable[[State], State], *, plain_too: bool = False) -> Callable[[Path, Path], None]:
    def write(folder: Path, plain: Path) -> None:
        for file in FILES.values():
            for where in (folder, plain) if plain_too else (folder,):
                save_file(change(load_file(where / file)), where / file, {"format": "pt"})

    return write


def cast(dtype: torch.dtype, parts: tuple[str, ...] = tuple(FILES)) -> Callable[[Path, Path], None]:
    def write(folder: Path, plain: Path) -> None:
        for part in parts:
            state = {key: value.to(dtype) for key, value in load_file(folder / FILES[part]).items()}
            save_file(state, folder / FILES[part], {"format": "pt"})
            save_file({key: value.float() for key, value in state.items()}, plain / FILES[part], {"format": "pt"})

    return write


def in_shards(folder: Path, plain: Path) -> None:
    for part, kind in CLASSES.items():
        model = kind.from_pretrained(folder / part)
        (folder / FILES[part]).unlink()
        model.save_pretrained(folder / part, max_shard_size="20KB")
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def beside_a_stale_file(folder: Path, plain: Path) -> None:
    in_shards(folder, plain)
    for file in FILES.values():
        save_file({"stale": torch.zeros(1)}, folder / file, {"format": "pt"})


def scaled(name: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, plain: Path) -> None:
        for part in parts_of(name):
            write_scaled(folder, plain, part, KINDS[name])

    return write


def parts_of(name: str) -> tuple[str, ...]:
    """The VAE's convolutions have no blocks."""
    return tuple(part for part in FILES if part != "vae" or not name.startswith(("DeepSeek", "groups", "musubi")))


def other_name(state: State) -> State:
    return {key.replace("shared.", "encoder.embed_tokens."): value for key, value in state.items()}


LAYOUTS = {
    "one file": Layout("`transformer/diffusion_pytorch_model.safetensors`", lambda folder, plain: None),
    "shards with an index": Layout("`transformer/diffusion_pytorch_model-00001-of-00006.safetensors`", in_shards),
    "shards with an index beside one file: the index wins": Layout(
        "`transformer/diffusion_pytorch_model.safetensors.index.json`", beside_a_stale_file
    ),
    **{
        f"{str(dtype).removeprefix('torch.')} numbers": Layout(stored, cast(dtype))
        for dtype, stored in ((torch.float64, "F64"), (torch.bfloat16, "BF16"), (torch.float16, "F16"))
    },
    "float8 numbers without scales": Layout(
        "F8_E4M3, F8_E5M2", cast(FP8_WIDE, ("transformer", "text_encoder")), ("transformer", "text_encoder")
    ),
    "the text encoder's table under its other name": Layout(
        "`encoder.embed_tokens.weight`", rewrite(other_name), ("text_encoder",)
    ),
    **{
        f"scales: {name} ({SPELT[kind[0]]})": Layout(f"`blocks.0.attn1.to_q.{kind[2]}`", scaled(name), parts_of(name))
        for name, kind in KINDS.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_as_the_same_numbers(tiny: Path, tmp_path: Path, name: str) -> None:
    folder, plain = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("model", "plain"))
    LAYOUTS[name].write(folder, plain)
    for part in FILES:
        found, expected = load(folder, part, torch.float32), load(plain, part, torch.float32)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items()), part


def test_parts_that_a_layout_is_not_for_say_so(tiny: Path, tmp_path: Path) -> None:
    folder, plain = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("model", "plain"))
    cast(FP8, ("vae",))(folder, plain)
    with pytest.raises(CheckpointError, match="without a scale, which is not read there"):
        validate(Checkpoint(folder))


def test_the_docs_have_the_table() -> None:
    rows = [[name, layout.shown, ", ".join(sorted(layout.parts))] for name, layout in LAYOUTS.items()]
    check_page("models.md", markdown(["checkpoint", "looks like", "parts"], rows))
    assert set(FILES) | {"transformer_2"} == {name for name, part in PARTS.items() if part.weights}
