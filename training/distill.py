"""Distil the pocket model to few steps without guidance: a LoRA in place of twenty guided steps.

The teacher is the shipped model with guidance. At each of the student's four noise levels the student learns the one velocity
with which a single Euler step lands where the teacher's guided flow goes, followed by the midpoint rule. The states are those
that the student comes to itself, from pure noise and a prompt, in films of several blocks made as the engine makes them
(`training/films.py`): it needs no scene, learns to go on from what it makes, and sees its neighbours as it will see them. No
random target is regressed on, so that nothing is blurred. Latents at a block's borders weigh more.

`python -m training.distill --work FOLDER` trains, killed and started again it goes on; `--export FILE` writes what is there.

Shapes: S steps of the student, f films, z latent channels, t latents, 8 x 8 in space.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dualparal.model.feature_cache import SelfAttention, Surroundings
from dualparal.model.source import POCKET_WEIGHTS
from training.checkpoints import Ema, TrainingLog, learning_rate, load_checkpoint, save_checkpoint
from training.films import NUM_CAT, Caches, Films, Text, make_films
from training.muon import Muon
from training.text import TextAttention, with_zero_key
from training.train_dit import TOKENS_PER_LATENT, object_weight

NUM_STEPS = 4  # of the student
SHIFT = 3.0  # of its noise levels, the pocket model's own
GUIDANCE = 2.5  # of the teacher, the pocket preset's
RANK = 32
TRAINING_STEPS, PEAK_RATE = 2000, 1.5e-3
BLOCKS_PER_STEP = 2  # of all films made together, so twice `NUM_FILMS` in one training step
RECOMPUTED = 0.15  # share of passes whose left context is recomputed, as the engine does where a job can be saved
BORDER_WEIGHT, BORDER_LATENTS = 2.0, 2  # of the loss, at either end of a block
USES = 25  # so many training steps for each lot of films
KEPT = 12  # lots to draw from
LEVEL_SHARES = (0.2, 0.2, 0.25, 0.35)  # the last step does most of the work
MAX_LATENTS = 64  # that positions are laid out for


def levels() -> list[float]:
    """Noise levels of the student's steps, noisiest first, and 0 at the end: an even division of [0, 1], shifted."""
    even = [1 - step / NUM_STEPS for step in range(NUM_STEPS + 1)]
    return [SHIFT * u / (1 + (SHIFT - 1) * u) for u in even]


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained change of low rank beside it; `is_on` False leaves the layer alone."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear, self.is_on = linear, True
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out + x @ self.down.T @ self.up.T if self.is_on else out

    @property
    def weight(self) -> torch.Tensor:  # diffusers asks for its dtype
        return self.linear.weight


class Student(nn.Module):
    """The pocket model; its LoRA is on for the student and off for the teacher."""

    def __init__(self, folder: Path = POCKET_WEIGHTS) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        self.requires_grad_(False).eval()
        self._attention = TextAttention()
        self._selves = [SelfAttention(layer) for layer in range(len(self.transformer.blocks))]
        for block, attention in zip(self.transformer.blocks, self._selves, strict=True):
            block.attn1.set_processor(attention)
            block.attn2.set_processor(self._attention)
        cos, sin = self.transformer.rope(torch.empty(1, 1, MAX_LATENTS, 8, 8, device="meta"))
        self._rope = torch.complex(cos[0, :, 0, 0::2].float(), sin[0, :, 0, 1::2].float())
        self.loras: dict[str, LoraLinear] = {}
        for name, module in list(self.transformer.named_modules()):
            if isinstance(module, nn.Linear) and is_changed(name):
                parent, _, last = name.rpartition(".")
                self.loras[name] = LoraLinear(module, min(RANK, *module.weight.shape))
                setattr(self.transformer.get_submodule(parent), last, self.loras[name])

    def read(self, captions: list[str]) -> Text:
        """Keys [f, 1 + n, d] of the captions and what pads them, for `pass_of`."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        with torch.no_grad():
            embedded = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return with_zero_key(embedded, tokens.attention_mask)

    def _velocity(self, x: torch.Tensor, level: float, text: Text, around: Surroundings, *, with_lora: bool) -> torch.Tensor:
        for lora in self.loras.values():
            lora.is_on = with_lora
        for attention in self._selves:
            attention.surroundings = around
        keys, self._attention.bias = text
        velocity: torch.Tensor = self.transformer(x, torch.full((len(x),), 1000 * level), keys, return_dict=False)[0]
        return velocity

    def pass_of(
        self, x: torch.Tensor, level: float, text: Text, left: Caches | None, right: Caches | None, num_left: int = 0
    ) -> tuple[torch.Tensor, Caches]:
        """The student's velocity [f, z, t, 8, 8] of a window `x` with these K and V around it, and what the pass leaves; the
        window's first `num_left` latents are the left block's and have no part in the velocity."""
        around = Surroundings(self._rope, left=left and dict(left), right=right and dict(right))
        around.tail = slice(-NUM_CAT * TOKENS_PER_LATENT, None)
        return self._velocity(x, level, text, around, with_lora=True)[:, :, num_left:], dict(around.kept_tail)

    def guided(self, x: torch.Tensor, level: float, text: Text, nothing: Text) -> torch.Tensor:
        """The teacher's velocity of a window of its own."""
        plain, asked = (self._velocity(x, level, one, Surroundings(self._rope), with_lora=False) for one in (nothing, text))
        return plain + GUIDANCE * (asked - plain)


def is_changed(name: str) -> bool:
    """Whether the LoRA changes this linear layer of the transformer."""
    return name.startswith("blocks.") or name in ("condition_embedder.time_proj", "proj_out")


def loss_of(student: Student, films: Films, rng: np.random.Generator) -> torch.Tensor:
    """Mean square error of the velocity of one block at one step, with its neighbours' K and V as the films have them."""
    block, step = int(rng.integers(len(films.x))), int(rng.choice(NUM_STEPS, p=LEVEL_SHARES))
    x, target, level = films.x[block][step].float(), films.target[block][step].float(), levels()[step]
    (left, right), window, num_left = films.around(block, step), x, 0
    if block and rng.uniform() < RECOMPUTED:
        left, num_left = None, NUM_CAT
        window = torch.cat([films.x[block - 1][step].float()[:, :, -NUM_CAT:], x], dim=2)
    velocity, _ = student.pass_of(window, level, student.read(films.captions), left, right, num_left)
    weight = object_weight(x - level * target, torch.tensor(level)) * border_weight(x.shape[2])
    return (weight * (velocity - target).square()).mean()


def border_weight(num_latents: int) -> torch.Tensor:
    """Weights [t, 1, 1] of a block's latents, mean 1."""
    weight = torch.ones(num_latents)
    weight[:BORDER_LATENTS] = weight[-BORDER_LATENTS:] = BORDER_WEIGHT
    return (weight / weight.mean())[:, None, None]


def training_steps(work: Path, seed: int, num_steps: int, deadline_s: float = math.inf) -> Iterator[tuple[int, Student, Ema]]:
    """Train from the last checkpoint in `work`, or from the start, until `num_steps` or `deadline_s` (of `time.time`); the
    rate falls with whichever is nearer. Yields after every checkpoint: steps done, student, averaged LoRA. Films are not
    saved: one that goes on makes new ones first."""
    torch.manual_seed(seed)
    student = Student()
    matrices = nn.ModuleDict({name.replace(".", "/"): lora for name, lora in student.loras.items()})
    trained = [parameter for parameter in matrices.parameters() if parameter.requires_grad]
    optimizer, ema = Muon(trained, lr=PEAK_RATE), Ema(student, 0.99)
    ema.shadow = {name: value for name, value in ema.shadow.items() if name.endswith((".down", ".up"))}
    kept: list[Films] = []
    log, first = TrainingLog(work / "distill.jsonl"), 0
    if state := load_checkpoint(work / "distill.pt"):
        student.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.step, first = state["ema"], state["step"], state["step"]
    losses, begun_s, channels = [], time.time(), student.transformer.config.in_channels
    for step in range(first, num_steps):
        rng = np.random.default_rng((seed, 4, step))
        if step % USES == 0 or not kept:
            kept = [*kept[-KEPT + 1 :], make_films(student, levels(), rng, channels)]
        done_share = max(step / num_steps, _share_of_time(first / num_steps, begun_s, deadline_s))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(round(done_share * num_steps), num_steps, peak=PEAK_RATE, warm_up=30)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(BLOCKS_PER_STEP):
            loss = loss_of(student, kept[int(rng.integers(len(kept)))], rng) / BLOCKS_PER_STEP
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        _average(ema, student)
        done, is_over = step + 1, time.time() >= deadline_s
        if done % 10 == 0:
            log.write(step=done, loss=round(sum(losses) / 10, 5))
            losses.clear()
        if done % 25 == 0 or done == num_steps or is_over:
            save_checkpoint(work / "distill.pt", {
                "lora": {n: v for n, v in student.state_dict().items() if n in ema.shadow}, "ema": ema.shadow, "step": done,
                "optimizer": optimizer.state_dict(),
            })  # fmt: skip
            yield done, student, ema
        if is_over:
            return


def _share_of_time(share_before: float, begun_s: float, deadline_s: float) -> float:
    if math.isinf(deadline_s):
        return 0.0
    return share_before + (1 - share_before) * (time.time() - begun_s) / max(1.0, deadline_s - begun_s)


def _average(ema: Ema, student: Student) -> None:
    parameters = {name: value for name, value in student.named_parameters() if name in ema.shadow}
    ema.step += 1
    decay = min(ema.decay, (1 + ema.step) / (10 + ema.step))
    for name, value in parameters.items():
        ema.shadow[name].lerp_(value.detach(), 1 - decay)


def as_file(averaged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averaged LoRA in diffusers' names, half precision."""
    found = {}
    for name, value in averaged.items():
        module, _, end = name.removeprefix("transformer.").rpartition(".")
        part = "lora_A" if end == "down" else "lora_B"
        found[f"transformer.{module}.{part}.weight"] = value.half().contiguous()
    return found


def export(work: Path, path: Path) -> None:
    """Write the last checkpoint's LoRA as one safetensors file."""
    state: dict[str, Any] | None = load_checkpoint(work / "distill.pt")
    if state is None:
        raise FileNotFoundError(f"{work} holds no checkpoint yet")
    about = {
        "steps": str(NUM_STEPS),
        "flow_shift": str(SHIFT),
        "solver": "euler",
        "guidance_scale": "1",
        "license": "Apache-2.0",
    }
    save_file(as_file(state["ema"]), path, about)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TRAINING_STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, the rate falling until then")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", type=Path, metavar="FILE", help="train nothing, write the LoRA there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.export is not None:
        export(options.work, options.export)
        return
    for _ in training_steps(options.work, options.seed, options.steps, time.time() + 60 * options.minutes):
        pass


if __name__ == "__main__":
    main()
