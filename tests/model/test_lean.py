"""What workers do not import, and that what was left out is there when it is needed. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from hypothesis import given
from hypothesis import strategies as st

from dualparal.model.text import prompt_clean
from tests.distributed.hooks import UNUSED

LEAN = "from dualparal.model.lean import import_diffusers\nimport_diffusers(is_compiled=False)\n"


def run(source: str, *arguments: object) -> str:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RANK = """
import dualparal.ring.rank_process
import torch
from pathlib import Path
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import Stage
from dualparal.method.sampler import SamplerFactory
checkpoint = Checkpoint(Path(sys.argv[1]))
Stage(checkpoint, range(checkpoint.num_layers), dtype="float32", device="cpu")
latents = torch.zeros(1, 4, 1, 2, 2)
factory = SamplerFactory(checkpoint.config("scheduler"), num_steps=2, flow_shift=3.0, device="cpu")
factory.new().step(latents, latents)
"""
CODEC = """
import dualparal.ring.codec_process
import torch
from pathlib import Path
from dualparal.model.layout import Checkpoint
from dualparal.model.text import TextEncoder
from dualparal.model.text_cache import EmbeddingCache
from dualparal.model.vae import StreamingDecoder
checkpoint = Checkpoint(Path(sys.argv[1]))
decoder = StreamingDecoder.load(checkpoint, device="cpu")
decoder.decode(torch.zeros(1, decoder.z_dim, 1, 2, 2))
cache = EmbeddingCache(Path(sys.argv[2]))
TextEncoder(checkpoint, device="cpu", dtype=torch.float32, cache=cache).encode("a cat")
"""


@pytest.mark.parametrize("worker", ["rank", "codec"])
def test_what_a_worker_does_not_import(tiny: Path, tmp_path: Path, worker: str) -> None:
    """Loading its part included; a prompt that was encoded before needs no tokenizer either."""
    told = f"\nprint(sorted({set(UNUSED)!r} & {{*sys.modules}}))"
    source = {"rank": RANK, "codec": CODEC}[worker]
    first = run("import sys\n" + LEAN + source + told, tiny, tmp_path)
    if worker == "codec":
        assert "'transformers'" in first, "a new prompt needs its encoder"
        first = run("import sys\n" + LEAN + source + told, tiny, tmp_path)
    assert first == "[]"


def test_what_was_left_out_is_there_when_needed() -> None:
    source = LEAN + (
        "import torch, sys\n"
        f"assert not {set(UNUSED)!r} & {{*sys.modules}}\n"
        "import transformers, peft\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item(), transformers.UMT5Config.__name__)"
    )
    assert run(source) == "2.0 UMT5Config"


def test_a_later_diffusers_that_needs_more_gets_it() -> None:
    source = (
        "import sys\n"
        "from dualparal.model.lean import import_diffusers\n"
        "import_diffusers(is_compiled=False, unused=('huggingface_hub',))\n"
        "print('diffusers' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    assert run(source) == "True True"


def test_whoever_compiles_gets_everything_marked() -> None:
    source = LEAN.replace("False", "True") + "import sys; print('torch._dynamo' in sys.modules)"
    assert run(source) == "True"


@given(st.text() | st.text(alphabet=" \t\r\n\f\v\x1c\x85\xa0&;ampltgquot#38âé€™“\u2003\u3000", max_size=40))
def test_prompts_are_cleaned_as_the_pipeline_cleans_them(prompt: str) -> None:
    assert prompt_clean(prompt) == pipeline_wan.prompt_clean(prompt)


def test_weights_alone_are_on_the_meta_device() -> None:
    from dualparal.model.checkpoint import WeightsOnMeta

    with WeightsOnMeta():
        linear, table = torch.nn.Linear(3, 4), torch.arange(5) / 2
    assert all(value.is_meta for value in linear.parameters())
    assert table.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
