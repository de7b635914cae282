"""The LoRA for four steps that ships: found by its name, small, told of, and good for what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dualparal.engine.engine import Engine
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_shelf import SHIPPED, LoraShelf
from dualparal.model.part_shapes import transformer_shapes
from dualparal.model.source import POCKET_WEIGHTS
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.pocket.metrics import adherence, read_frames
from dualparal.pocket.world import Prompt
from dualparal.presets import complete, find_preset, load_presets
from dualparal.request import GenerationRequest
from dualparal.ui.studio import Studio
from tests.local_ring import denoise_in_threads
from training import distill, films

FILE = SHIPPED / "pocket-fast.safetensors"
LATENTS = 32


@pytest.fixture(scope="module")
def shelf() -> LoraShelf:
    return LoraShelf(None, 1, transformer_shapes(Checkpoint(POCKET_WEIGHTS).config("transformer")))


def test_it_is_small_and_says_what_it_is() -> None:
    assert FILE.stat().st_size <= 2_000_000
    with safe_open(FILE, "pt") as file:
        about = file.metadata()
    assert about["license"] == "Apache-2.0"
    assert (int(about["steps"]), float(about["flow_shift"]), about["solver"]) == (4, 3.0, "euler")
    assert "/" not in json.dumps(about), "nor where it was made"


def test_its_preset_asks_for_what_it_was_distilled_for() -> None:
    presets = load_presets()
    assert find_preset("pocket") == presets["pocket"], "LoRAs are for those who ask for them"
    settings = complete(GenerationRequest(prompt="x"), presets["pocket-fast"])
    assert (settings.loras, settings.num_inference_steps, settings.has_guidance) == (("pocket-fast",), 4, False)
    assert (settings.num_per_block, settings.num_cat, settings.context) == (films.NUM_PER_BLOCK, films.NUM_CAT, "cached")
    assert settings.stagger == 1, "as in the films that it was trained in"
    sampler = SamplerFactory(
        {}, num_steps=settings.num_inference_steps, flow_shift=settings.flow_shift, device="cpu", solver=settings.solver
    )
    assert sampler.sigmas == pytest.approx(distill.levels())


def test_it_is_found_by_its_name_and_offered_to_everybody(shelf: LoraShelf) -> None:
    assert shelf.is_at_hand(["pocket-fast"]) and "pocket-fast" in shelf.offered()
    shelf.check_offered(["pocket-fast", "pocket-fast:0.9"])
    (found,) = shelf.find(["pocket-fast"])
    assert found.file == str(FILE)


def test_it_stands_beside_the_pocket_model_on_one_engine(tmp_path: Path) -> None:
    studio = Studio(Engine("pocket", device="cpu", outputs=tmp_path), load_presets())
    assert [preset.name for preset in studio.usable_presets()] == ["pocket", "pocket-fast"]
    asked = GenerationRequest(prompt="a red circle bouncing on a navy background")
    plain, fast = (studio.resolve(asked, name) for name in (None, "pocket-fast"))
    assert (plain.loras, plain.num_inference_steps) == ((), 20)
    assert (fast.loras, fast.num_inference_steps, fast.model) == (("pocket-fast",), 4, plain.model)
    studio.check_loras(fast)


def test_no_other_model_is_offered_it() -> None:
    assert LoraShelf(None, 1, {"blocks.0.attn1.to_q.weight": (8, 8)}).offered() == []


@pytest.mark.parametrize(
    ("caption", "seed"),
    [("a red circle bouncing on a navy background", 0), ("a blue square moving right on a white background", 1)],
)
def test_what_was_promised_appears_and_moves(shelf: LoraShelf, caption: str, seed: int) -> None:
    student = distill.Student()  # for its tokenizer and text encoder
    tokens = student.tokenizer([caption], return_tensors="pt").input_ids
    with torch.no_grad():
        text = student.text_encoder(tokens).last_hidden_state
    blocks = denoise_in_threads(
        POCKET_WEIGHTS, latents_num=LATENTS, num_per_block=8, num_cat=8, steps=4, size=(8, 8), guidance=(1.0, 1.0),
        texts=[[torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))]], flow_shift=3.0, solver="euler", seed=seed,
        rules=Rules(context="cached"), beside=shelf.find(["pocket-fast"]),
    )  # fmt: skip
    decoder = StreamingDecoder.load(Checkpoint(Path(POCKET_WEIGHTS)), device="cpu")
    frames = to_uint8(torch.cat([decoder.decode(blocks[b]) for b in sorted(blocks)], dim=2)).numpy()
    marks = adherence(read_frames(frames), Prompt.parse(caption))
    assert len(frames) == 4 * LATENTS - 3
    assert marks["color"] > 0.9 and marks["background"] > 0.9 and marks["motion"] > 0.9 and marks["shape"] > 0.6, marks
