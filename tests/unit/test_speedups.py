"""Attention backends and torch.compile: the same numbers on the CPU, clear refusals where they cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dualparal.errors import RequestError
from dualparal.model.layout import Checkpoint
from dualparal.model.speedups import use_attention
from dualparal.model.stage import Stage
from tests.local_ring import denoise_in_threads
from tests.texts import joined, some_texts

CASE: dict[str, Any] = dict(latents_num=7, num_per_block=2, num_cat=1, steps=3)


def test_native_is_the_default(tiny: Path) -> None:
    plain = denoise_in_threads(tiny, texts=some_texts(), ranks=2, **CASE)
    named = denoise_in_threads(tiny, texts=some_texts(), ranks=2, attention="native", **CASE)
    assert torch.equal(joined(plain), joined(named))
    math = denoise_in_threads(tiny, texts=some_texts(), ranks=2, attention="_native_math", **CASE)
    assert 0 < (joined(plain) - joined(math)).abs().max() <= 1e-4, "another kernel, nearly the same numbers"


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("flash", "cpu", "needs a GPU"),
        ("quick", "cpu", "not known to diffusers; use one of "),
        ("flash", "meta", "cannot be used here: Flash Attention backend"),
        ("sage", "meta", "cannot be used here: Sage Attention backend"),
        ("xformers", "meta", "cannot be used here: Xformers Attention backend"),
    ],
)
def test_what_is_not_to_be_had(tiny: Path, name: str, device: str, says: str) -> None:
    model = Stage(Checkpoint(tiny), range(4), dtype="float32", device="cpu").models[0]
    with pytest.raises(RequestError, match=says) as refused:
        use_attention(model, name, torch.device(device))
    assert refused.value.field == "attention"


def test_compiled_layers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that torch.compile takes, run as they are: this host need not have a C++ compiler."""
    original, compiled = nn.Module.compile, []

    def compile(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        original(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    plain = denoise_in_threads(tiny, texts=some_texts(), **CASE)
    found = denoise_in_threads(tiny, texts=some_texts(), is_compiled=True, **CASE)
    assert len(compiled) == 4
    assert (joined(plain) - joined(found)).abs().max() <= 1e-5
