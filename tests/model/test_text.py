"""Text embeddings: equal to WanPipeline's, loaded when first needed, kept on disk, the encoder put away as asked."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from dualparal.errors import CheckpointError
from dualparal.model import text as text_module
from dualparal.model.fingerprint import fingerprint
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.text_cache import EmbeddingCache

PROMPTS = ("", "a red circle", "  two \t squares &amp; a line ", "ä" * 600)


def encoder(folder: Path, cache: Path | None = None, **options: Any) -> TextEncoder:
    kept = EmbeddingCache(cache) if cache else None
    return TextEncoder(Checkpoint(folder), device="cpu", dtype=torch.float32, cache=kept, **options)


def test_equal_to_the_pipelines(tiny: Path, tmp_path: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    ours = encoder(tiny, tmp_path)
    for prompt in PROMPTS:
        with torch.inference_mode():  # attention takes another way where gradients are kept
            expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        found = ours.encode(prompt)
        assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-6
        assert torch.equal(ours.encode(prompt), found), "from the cache"


def test_a_hit_costs_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder(tiny, tmp_path)
    assert not first.is_loaded, "nothing is loaded before the first prompt"
    expected = [first.encode(prompt) for prompt in PROMPTS]
    assert first.is_loaded
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    monkeypatch.setattr(text_module, "load_text_encoder", None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    second = encoder(tiny, tmp_path)
    assert all(torch.equal(second.encode(prompt), value) for prompt, value in zip(PROMPTS, expected, strict=True))
    assert not second.is_loaded


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a" * 511, None), ("a" * 512, "a"), ("b " * 255 + "c", None), ("b " * 255 + "cd e", "cd"),
        ("b " * 255 + "c dog and more", "dog"), ("bb " * 170 + "cat after", "cat"), ("b " * 250 + " &amp;\t" * 9, "&"),
        ("ä" * 300, "ä" * 30 + "…"), ("", None), ("short", None),
    ],
)  # fmt: skip
def test_the_first_word_that_is_lost(tiny: Path, tmp_path: Path, prompt: str, word: str | None) -> None:
    """The tiny tokenizer has one token for each byte, and one for the end."""
    ours = encoder(tiny, tmp_path)
    for _ in range(2):  # the second time from the cache
        assert ours.first_lost(prompt, ours.encode(prompt)) == word


def test_only_a_full_embedding_needs_the_tokenizer_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder(tiny)
    embeddings = ours.encode("short")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    assert ours.first_lost("short", embeddings) is None


def test_what_an_embedding_depends_on(tiny: Path, tmp_path: Path) -> None:
    def num_files(folder: Path = tiny, **options: Any) -> int:
        cache = EmbeddingCache(tmp_path / "cache")
        TextEncoder(Checkpoint(folder), cache=cache, **{"device": "cpu", "dtype": torch.float32, **options}).encode("x")
        return len(list((tmp_path / "cache").iterdir()))

    assert (num_files(), num_files()) == (1, 1)
    assert num_files(dtype=torch.bfloat16) == 2
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert (num_files(copy), num_files(copy)) == (2, 2), "the same files elsewhere"
    before = fingerprint(copy / "text_encoder", copy / "tokenizer")
    with (copy / "text_encoder" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    assert fingerprint(copy / "text_encoder", copy / "tokenizer") != before
    assert num_files(copy) == 3


@pytest.mark.parametrize(("place", "is_loaded"), [("keep", True), ("cpu", True), ("free", False)])
def test_where_the_encoder_waits(tiny: Path, place: str, is_loaded: bool) -> None:
    ours = encoder(tiny, place=place)
    ours.rest()
    before = ours.encode("x")
    ours.rest()
    assert ours.is_loaded is is_loaded
    assert torch.equal(ours.encode("x"), before)


def test_the_cache_is_bounded_and_never_fails(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=3000)
    value = torch.arange(200.0).view(1, 2, 100)  # 800 bytes and a header
    for number, name in enumerate("abc"):
        cache.store(name, value)
        os.utime(tmp_path / "cache" / f"{name}.safetensors", (number, number))
    assert torch.equal(cache.load("a"), value)  # now the newest
    time.sleep(0.01)
    cache.store("d", value)
    names = {path.stem for path in (tmp_path / "cache").iterdir()}
    assert "d" in names and "a" in names and "b" not in names
    (tmp_path / "cache" / "d.safetensors").write_bytes(b"torn")
    assert cache.load("d") is None
    (tmp_path / "file").touch()
    broken = EmbeddingCache(tmp_path / "file")
    broken.store("x", value)
    assert broken.load("x") is None


def test_damaged_embeddings_are_a_miss(tmp_path: Path) -> None:
    """Else a prompt would give another video."""
    cache, value = EmbeddingCache(tmp_path), torch.randn(1, 3, 8).bfloat16()
    cache.store("a", value)
    cache.store("b", value + 1)
    file = tmp_path / "a.safetensors"
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = cache.load("a")
        assert found is None or torch.equal(found, value), place
    file.write_bytes((tmp_path / "b.safetensors").read_bytes())
    assert cache.load("a") is None, "another prompt's"
    file.write_bytes(whole)
    assert torch.equal(cache.load("a"), value)  # type: ignore[arg-type]


def test_a_folder_that_can_only_be_read_serves_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.store("a", torch.ones(1, 2, 3))

    def utime(*_: object) -> None:
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr("dualparal.model.text_cache.os.utime", utime)
    found = cache.load("a")
    assert found is not None and torch.equal(found, torch.ones(1, 2, 3))
    assert cache.load("b") is None


def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    weights = copy / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    lost = next(key for key in state if "SelfAttention.q" in key)
    save_file({key: value for key, value in state.items() if key != lost}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks encoder"):
        encoder(copy).encode("x")
