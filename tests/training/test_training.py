"""The shortcuts of Pocket Wan's training give the numbers of diffusers' own paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dualparal.pocket.world import Prompt, training_prompts
from training.checkpoints import Ema, learning_rate, load_checkpoint, save_checkpoint
from training.full_sequence import decode_clip, encode_clip, use_full_sequence
from training.latent_bank import MEMORY_LATENTS, LatentBank
from training.muon import Muon, orthogonalize
from training.text import build_tokenizer
from training.train_dit import PocketModel, sample_batch
from training.train_vae import build_vae, object_weights, sample_clips


@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_one_causal_pass_equals_the_cached_loop(num_latents: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    video = torch.rand(2, 3, 4 * num_latents - 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mode()
        decoded = vae.decode(mean).sample
        use_full_sequence(vae)
        assert mean.shape == (2, 12, num_latents, 8, 8)
        assert (encode_clip(vae, video)[0] - mean).abs().max() < 1e-5
        assert (decode_clip(vae, mean).clamp(-1, 1) - decoded).abs().max() < 1e-4


def test_one_zero_key_equals_padding_to_512() -> None:
    torch.manual_seed(0)
    model = PocketModel(build_tokenizer()).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    captions = ["a red circle moving left on a navy background", ""]
    tokens = model.tokenizer(captions, padding=True, return_tensors="pt")
    full = model.tokenizer(captions, padding="max_length", max_length=512, return_tensors="pt")
    latents, level = torch.randn(2, 12, 3, 8, 8), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        short = model(latents, level, tokens.input_ids, tokens.attention_mask)
        embedded = model.text_encoder(full.input_ids, attention_mask=full.attention_mask).last_hidden_state
        for block in model.transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        padded = embedded * full.attention_mask[..., None]
        long = model.transformer(latents, 1000 * level, padded, return_dict=False)[0]
    assert (short - long).abs().max() < 1e-4 * long.std()


def test_tokenizer_knows_the_world_and_says_so_of_the_rest() -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.unk_token_id
    for prompt in training_prompts()[::50]:
        assert unknown not in tokenizer(prompt.caption).input_ids
    plain = tokenizer("a red circle bouncing on a grey background").input_ids
    assert tokenizer("A red circle, bouncing on a GRAY background.").input_ids == plain
    assert tokenizer("a red dog").input_ids == [*tokenizer("a red").input_ids[:-1], unknown, 1]
    assert tokenizer.pad_token_id == 0


def test_bank_cuts_any_length_and_depends_on_the_seed_only() -> None:
    torch.manual_seed(0)
    vae = use_full_sequence(build_vae())
    banks = [LatentBank(vae, seed=3) for _ in range(2)]
    banks[0].grow(2)
    banks[1].grow(1)
    banks[1].grow(1)
    for (a, x, p), (b, y, q) in zip(banks[0].scenes, banks[1].scenes, strict=True):
        assert (a, p) == (b, q)
        assert torch.equal(x, y)
        assert x.shape == (12, MEMORY_LATENTS + p, 8, 8)
    assert banks[0].window(np.random.default_rng(0), 21)[1].shape == (12, 21, 8, 8)
    clean, level, ids, mask = sample_batch(banks[0], build_tokenizer(), np.random.default_rng(0), 3.0)
    assert len(clean) == len(level) == len(ids) == len(mask)
    assert 0 < level.min() < level.max() <= 1


def test_object_pixels_weigh_more() -> None:
    clips = sample_clips(
        [Prompt(color="red", shape="square", motion="circling", background="white")], 2, 1, np.random.default_rng(0)
    )
    weights = object_weights(clips)
    assert 0.02 < (weights > 1).float().mean() < 0.2
    assert weights[:, :, :, 0, 0].eq(1).all()


def test_muon_takes_orthogonal_steps() -> None:
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().mean() < 0.1


def test_training_helpers(tmp_path: Path) -> None:
    assert learning_rate(0, 1000, peak=1.0) < learning_rate(50, 1000, peak=1.0) < learning_rate(100, 1000, peak=1.0) == 1.0
    assert learning_rate(1000, 1000, peak=1.0) == pytest.approx(0.02)
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    with ema.applied(model):
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, before + 1)
    assert load_checkpoint(tmp_path / "none.pt") is None
    save_checkpoint(tmp_path / "a.pt", {"step": 3})
    assert load_checkpoint(tmp_path / "a.pt") == {"step": 3}
