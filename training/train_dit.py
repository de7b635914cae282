"""Train Pocket Wan's transformer (`WanTransformer3DModel`) and text encoder together, by flow matching on the latents of
`LatentBank`.

x_s = (1 - s) x_0 + s n with noise level s in 0 .. 1 and noise n; the model is given x_s and 1000 s and learns the velocity n
- x_0. Windows of 5 to 21 latents, never more than Wan's own 81 frames. One prompt in ten is dropped, for guidance.

Shapes: b batch, z latent channels, t latents, 8 x 8 in space.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from training.checkpoints import Ema, TrainingLog, learning_rate, load_checkpoint, save_checkpoint
from training.full_sequence import use_full_sequence
from training.latent_bank import LatentBank
from training.muon import build_optimizers
from training.text import TEXT_DIM, TextAttention, build_text_encoder, build_tokenizer, with_zero_key
from training.train_vae import Z_DIM

# (steps, peak learning rate, shift of the noise levels): warm-up and cosine, four times. Levels are drawn as a sampler with
# that flow shift visits them: motion is decided at the high ones, corners at the low ones; the last cycle draws more of these.
CYCLES = ((2300, 1.5e-3, 3.0), (550, 7e-4, 3.0), (2150, 1.2e-3, 3.0), (3200, 1.2e-3, 2.0))
NUM_STEPS = sum(steps for steps, _, _ in CYCLES)
TOKENS_PER_STEP = 2400
WINDOW_LATENTS = (5, 21)
TOKENS_PER_LATENT = 16
DROP_PROMPT, UNKNOWN_WORDS = 0.1, 0.05
FIRST_SCENES, STEPS_PER_SCENE, MOST_SCENES = 1000, 5, 2500
OBJECT_WEIGHT = 4.0  # how much more the object counts than the flat background, at noise level 0; corners are decided late


class PocketModel(nn.Module):
    """Text encoder and transformer as one thing to train."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(len(tokenizer))
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=32, in_channels=Z_DIM, out_channels=Z_DIM,
            text_dim=TEXT_DIM, freq_dim=128, ffn_dim=512, num_layers=6, cross_attn_norm=True,
        )  # fmt: skip
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.text_attention = TextAttention()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self.text_attention)

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity [b, z, t, 8, 8] of `noisy` at noise levels [b], for token ids and mask [b, n]."""
        embedded = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        keys, self.text_attention.bias = with_zero_key(embedded, mask)
        velocity: torch.Tensor = self.transformer(noisy, 1000 * level, keys, return_dict=False)[0]
        return velocity


def sample_batch(
    bank: LatentBank, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, shift: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean windows [b, z, t, 8, 8], noise levels [b], token ids and mask [b, n]."""
    shortest, longest = WINDOW_LATENTS
    num_latents = shortest + int((longest + 1 - shortest) * rng.uniform() ** 2)  # more scenes a step than with long windows
    batch = round(TOKENS_PER_STEP / (TOKENS_PER_LATENT * num_latents))
    prompts, windows = zip(*(bank.window(rng, num_latents) for _ in range(batch)), strict=True)
    captions = [spoil_caption(prompt.caption, rng) for prompt in prompts]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    u = torch.from_numpy((rng.permutation(batch) + rng.uniform(size=batch)) / batch).float()  # spread evenly
    level = shift * u / (1 + (shift - 1) * u)
    return torch.stack(windows), level, tokens.input_ids, tokens.attention_mask


def spoil_caption(caption: str, rng: np.random.Generator) -> str:
    """Sometimes no caption at all, sometimes filler words the tokenizer does not know."""
    if rng.uniform() < DROP_PROMPT:
        return ""
    if rng.uniform() < UNKNOWN_WORDS:
        return " ".join("?unknown" if w in ("a", "on", "background") and rng.uniform() < 0.3 else w for w in caption.split())
    return caption


def object_weight(clean: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Loss weights [b, 1, t, 8, 8], mean 1, for clean latents [b, z, t, 8, 8] and noise levels [b, 1, 1, 1, 1].

    The object is where latents are far from the window's median, which is background. The weight fades with the noise, where
    nobody can know yet where the object is.
    """
    median = clean.flatten(2).median(dim=2).values[:, :, None, None, None]
    distance = (clean - median).square().mean(dim=1, keepdim=True)
    is_object = distance > distance.mean(dim=(2, 3, 4), keepdim=True)
    weight = 1 + OBJECT_WEIGHT * (1 - s) * is_object
    return weight / weight.mean(dim=(2, 3, 4), keepdim=True)


def parameter_groups(model: PocketModel) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the transformer's matrices, AdamW for embeddings, tables, the last projection and the text encoder."""
    return build_optimizers(model, CYCLES[0][1], keep_out=("text_encoder", "scale_shift_table", "proj_out", "patch_embedding"))


def rate_and_shift(step: int) -> tuple[float, float]:
    """The learning rate of that step, and the shift of its noise levels."""
    for num_steps, peak, shift in CYCLES:
        if step < num_steps:
            return learning_rate(step, num_steps, peak=peak, warm_up=min(100, num_steps // 20)), shift
        step -= num_steps
    return learning_rate(1, 1, peak=CYCLES[-1][1], warm_up=0), CYCLES[-1][2]


def training_steps(work: Path, vae: AutoencoderKLWan, seed: int, num_steps: int) -> Iterator[tuple[int, PocketModel, Ema]]:
    """Train from the last checkpoint in `work`, or from scratch; yields after every checkpoint: steps done, model, averaged
    weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = PocketModel(tokenizer)
    optimizers = parameter_groups(model)
    ema = Ema(model, 0.998)
    bank = LatentBank(use_full_sequence(vae), seed)
    log = TrainingLog(work / "dit.jsonl")
    first = 0
    if state := load_checkpoint(work / "dit.pt"):
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.shadow, ema.step, first, bank.scenes = state["ema"], state["step"], state["step"], state["scenes"]
    bank.grow(FIRST_SCENES - len(bank.scenes))
    running = 0.0
    for step in range(first, num_steps):
        rng = np.random.default_rng((seed, 3, step))
        if step % STEPS_PER_SCENE == 0 and len(bank.scenes) < MOST_SCENES:
            bank.grow(1)
        rate, shift = rate_and_shift(step)
        clean, level, ids, mask = sample_batch(bank, tokenizer, rng, shift)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        s = level.view(-1, 1, 1, 1, 1)
        error = model((1 - s) * clean + s * noise, level, ids, mask) - (noise - clean)
        loss = (object_weight(clean, s) * error.square()).mean()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
        running += loss.item()
        done = step + 1
        if done % 25 == 0:
            log.write(step=done, loss=round(running / 25, 5), scenes=len(bank.scenes))
            running = 0.0
        if done % 200 == 0 or done == num_steps:
            save_checkpoint(work / "dit.pt", {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                                              "ema": ema.shadow, "step": done, "scenes": bank.scenes})  # fmt: skip
            yield done, model, ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs; holds the finished encoder/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = AutoencoderKLWan.from_pretrained(args.work / "encoder")
    for _ in training_steps(args.work, vae, args.seed, args.steps):
        pass


if __name__ == "__main__":
    main()
