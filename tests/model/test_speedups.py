"""Attention backends and torch.compile: the same numbers on the CPU, clear refusals where they cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from dualparal import Engine, devices
from dualparal.cli.main import main
from dualparal.engine import setup as equipment
from dualparal.errors import RequestError
from dualparal.model import attention_backends
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


def test_a_backend_is_one_models_own_business(tiny: Path) -> None:
    """diffusers also makes it the process's default, which whoever asked for none would get."""
    one, other = (Stage(Checkpoint(tiny), range(4), dtype="float32", device="cpu").models[0] for _ in range(2))
    use_attention(one, "_native_math", torch.device("cpu"))
    assert one.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert other.blocks[0].attn1.processor._attention_backend is None
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("flash", "cpu", "needs a GPU"),
        ("quick", "cpu", "not known to diffusers; use one of "),
        ("flash", "meta", "needs the package flash_attn"),
        ("flash", "old", "cannot be used here: Flash Attention backend"),
        ("sage", "old", "cannot be used here: Sage Attention backend"),
        ("xformers", "old", "cannot be used here: Xformers Attention backend"),
    ],
)
def test_what_is_not_to_be_had(tiny: Path, name: str, device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "old":  # the package is there, in a version that diffusers refuses: the last word is its own
        device = "meta"
        monkeypatch.setattr("dualparal.model.speedups.check_attention", lambda name, on_gpu: name)
    model = Stage(Checkpoint(tiny), range(4), dtype="float32", device="cpu").models[0]
    with pytest.raises(RequestError, match=says) as refused:
        use_attention(model, name, torch.device(device))
    assert refused.value.field == "attention"


def test_the_table_names_every_backend_of_diffusers() -> None:
    assert set(attention_backends.BACKENDS) == {backend.value for backend in AttentionBackendName}


@pytest.mark.parametrize("name", sorted(attention_backends.BACKENDS))
def test_the_table_knows_what_diffusers_asks_for(name: str) -> None:
    """Where diffusers finds a package missing, so does the front end, before any work."""
    try:
        attention_dispatch._check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError:
        with pytest.raises(RequestError, match=f"attention={name} needs the package"):
            attention_backends.check_attention(name)
    else:
        assert attention_backends.check_attention(name) == name


@pytest.mark.parametrize(
    ("options", "gpus", "field", "says"),
    [
        ({"attention": "quick"}, 0, "attention", r"'quick' is not known to diffusers; use one of .*flash, .*native"),
        ({"attention": "flash"}, 0, "attention", "needs a GPU; on the CPU use native or flex"),
        (
            {"attention": "sage"},
            1,
            "attention",
            r"sageattention \(pip install sageattention\); what can be used here: flex, native",
        ),
        ({"quantization": "int8"}, 0, "quantization", "pip install torchao"),
        ({"quantization": "int4"}, 0, "quantization", "use fp8 or int8"),
    ],
)
def test_the_engine_refuses_before_anything_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], gpus: int, field: str, says: str
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: gpus)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no such package is installed
    with pytest.raises(RequestError, match=says) as refused:
        Engine(str(tiny), outputs=tmp_path / "outputs", **options)
    assert refused.value.field == field
    assert not (tmp_path / "outputs").exists()


def test_a_bad_name_costs_no_download(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(equipment, "find_checkpoint", lambda *given: pytest.fail("the model was looked for"))
    command = ["generate", "--preset", "wan2.1-1.3b-480p", "--prompt", "x", "--attention"]
    assert main([*command, "quick"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: attention='quick'") and "job " not in printed.out


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
