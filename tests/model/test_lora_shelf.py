"""The names that requests may give LoRAs, and what a stranger may not ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dualparal.errors import RequestError
from dualparal.model import lora_shelf
from dualparal.model.lora_shelf import LoraShelf, as_record, from_record, spec_of
from dualparal.model.lora_source import name_among

SHAPES = {"blocks.0.attn1.to_q.weight": (24, 24), "blocks.0.attn1.to_q.bias": (24,)}
RANK = 2


def lora(path: Path, width: int = 24) -> Path:
    name = "diffusion_model.blocks.0.self_attn.q"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.lora_A.weight": torch.ones(RANK, width), f"{name}.lora_B.weight": torch.ones(width, RANK)}, path)
    return path


@pytest.fixture
def shelf(tmp_path: Path) -> LoraShelf:
    for name in ("fast.safetensors", "styles/ink.safetensors", "styles/a:0.5.safetensors", ".hidden/no.safetensors"):
        lora(tmp_path / "loras" / name)
    (tmp_path / "loras" / "notes.txt").touch()
    lora(tmp_path / "elsewhere" / "fast.safetensors")
    return LoraShelf(tmp_path / "loras", 1, SHAPES)


def test_the_folders_files_are_called_by_their_paths_within(shelf: LoraShelf, tmp_path: Path) -> None:
    assert sorted(shelf.known()) == ["fast.safetensors", "styles/a:0.5.safetensors", "styles/ink.safetensors"]
    found = shelf.find(["styles/ink.safetensors:0.8", "styles/a:0.5.safetensors", "fast.safetensors"])
    assert [Path(one.file) for one in found] == [
        tmp_path / "loras" / name for name in ("styles/ink.safetensors", "styles/a:0.5.safetensors", "fast.safetensors")
    ]
    assert [one.scale for one in found] == [0.8, 1, 1]
    assert [spec_of(one) for one in found] == ["styles/ink.safetensors:0.8", "styles/a:0.5.safetensors", "fast.safetensors"]
    lora(tmp_path / "loras" / "new.safetensors")
    assert "new.safetensors" in shelf.known(), "without a restart"


@pytest.mark.parametrize(
    "asked", ["{there}/fast.safetensors", "../elsewhere/fast.safetensors", "{there}", "someone/else", "fast", "/etc/passwd",
              "someone/else/x.safetensors", "~/x", "high:../elsewhere/fast.safetensors:1"],
)  # fmt: skip
def test_strangers_name_no_files_of_this_machine(shelf: LoraShelf, tmp_path: Path, asked: str) -> None:
    asked = asked.format(there=tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="is not a LoRA of this server") as caught:
        shelf.check_offered([asked])
    assert caught.value.field == "loras"


def test_what_is_offered(shelf: LoraShelf) -> None:
    of_presets = ["owner/name/some.safetensors:0.5", "low:owner/name/other.safetensors"]
    shelf.check_offered(["fast.safetensors:0.3", "owner/name/some.safetensors", "owner/name/other.safetensors:2"], of_presets)
    assert shelf.offered(of_presets)[-2:] == ["owner/name/some.safetensors", "owner/name/other.safetensors"]
    with pytest.raises(RequestError, match="this server has none"):
        LoraShelf(None, 1, SHAPES).check_offered(["x"])


def test_who_may_read_files_gives_paths(shelf: LoraShelf, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "fast.safetensors"
    (found,) = shelf.find([f"{path}:0.5"])
    assert found.file == str(path) and spec_of(found) == "fast.safetensors:0.5"
    assert from_record(as_record([found])) == (found,)
    path.unlink()
    with pytest.raises(RequestError, match="not there any more; put it back"):
        from_record(as_record([found]))
    with pytest.raises(RequestError, match="submit it anew"):
        from_record([{"name": "x"}])


@pytest.mark.parametrize("spec", ["low:fast.safetensors", "fast.safetensors:101", "fast.safetensors:x", "no.safetensors"])
def test_what_cannot_be_used_is_refused_in_one_sentence(shelf: LoraShelf, spec: str) -> None:
    with pytest.raises(RequestError) as caught:
        shelf.find([spec])
    assert caught.value.field == "loras" and "\n" not in str(caught.value)


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    lora(tmp_path / "x.safetensors", width=32)
    with pytest.raises(RequestError, match="it is for another model"):
        LoraShelf(tmp_path, 1, SHAPES).find(["x.safetensors"])


def test_experts_are_said_or_spoken_of(tmp_path: Path) -> None:
    for name in ("ink_high_noise.safetensors", "ink.safetensors"):
        lora(tmp_path / name)
    shelf = LoraShelf(tmp_path, 2, SHAPES)
    found = shelf.find(["ink_high_noise.safetensors", "low:ink.safetensors:0.5", "ink.safetensors"])
    assert [one.experts for one in found] == [(0,), (1,), (0, 1)]
    assert [spec_of(one) for one in found] == ["ink_high_noise.safetensors", "low:ink.safetensors:0.5", "ink.safetensors"]
    one = 2 * RANK * 24
    assert shelf.elements(["ink.safetensors"]) == 2 * one and shelf.elements(["low:ink.safetensors"]) == one


def test_the_hub_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lora(tmp_path / "cache" / "x.safetensors")
    monkeypatch.setattr(lora_shelf, "at_hand", lambda name: path if name == "owner/name/x.safetensors" else None)
    shelf = LoraShelf(None, 1, SHAPES)
    (found,) = shelf.find(["owner/name/x.safetensors:0.5"])
    assert (found.file, spec_of(found)) == (str(path), "owner/name/x.safetensors:0.5")
    assert shelf.is_at_hand(["owner/name/x.safetensors"]) and not shelf.is_at_hand(["owner/name/y.safetensors"])
    assert shelf.elements(["owner/name/y.safetensors"]) is None


def test_names_among_others() -> None:
    names = ["a", "a:0.5", "high:b", "c:d"]
    asked = ["a", "a:2", "high:a", "LOW:a:1", "a:0.5", "a:0.5:2", "high:b", "c:d:1", "high:c:d", "c", "", ":1", "x:a"]
    assert [name_among(spec, names) for spec in asked] == [
        "a", "a", "a", "a", "a:0.5", "a:0.5", "high:b", "c:d", "c:d", None, None, None, None
    ]  # fmt: skip
