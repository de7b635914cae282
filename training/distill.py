"""Distil the pocket model to few steps without guidance: a LoRA in place of twenty guided steps.

The teacher is the shipped model with guidance. At each of the student's four noise levels the student learns the one velocity
with which a single Euler step lands where the teacher's guided flow goes, followed by the midpoint rule (two guided
evaluations). The states are those that the student comes to itself, from pure noise and a prompt: it needs no scene, and learns
to go on from what it makes. No random target is regressed on, so that nothing is blurred.

A block sees the next one a step noisier than it is itself, with four steps up to a quarter of the noise. So most windows end
with such latents, and what is learnt of the others is still what the teacher does where all are alike.

`python -m training.distill --work FOLDER` trains, killed and started again it goes on; `--export FILE` writes what is there.

Shapes: S steps of the student, b batch, z latent channels, t latents, 8 x 8 in space.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dualparal.model.source import POCKET_WEIGHTS
from dualparal.pocket.world import training_prompts
from training.checkpoints import Ema, TrainingLog, learning_rate, load_checkpoint, save_checkpoint
from training.muon import Muon
from training.text import TextAttention, with_zero_key
from training.train_dit import TOKENS_PER_LATENT, object_weight

NUM_STEPS = 4  # of the student
SHIFT = 3.0  # of its noise levels, the pocket model's own
GUIDANCE = 2.5  # of the teacher, the pocket preset's
RANK = 32
TRAINING_STEPS, PEAK_RATE = 2000, 1.5e-3
TOKENS_PER_STEP = 800
WINDOW_LATENTS = (8, 24)
AS_BLOCKS = 0.75  # share of training steps whose windows are as the engine's, the next block a step noisier
RIGHT_LATENTS = (4, 8)  # of the next block in these
USES = 8  # so many training steps for each batch that is made
KEPT = 64  # batches to draw from
LEVEL_SHARES = (0.2, 0.2, 0.25, 0.35)  # the last step does most of the work

Text = tuple[torch.Tensor, torch.Tensor]


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
        for block in self.transformer.blocks:
            block.attn2.set_processor(self._attention)
        self.loras: dict[str, LoraLinear] = {}
        for name, module in list(self.transformer.named_modules()):
            if isinstance(module, nn.Linear) and is_changed(name):
                parent, _, last = name.rpartition(".")
                self.loras[name] = LoraLinear(module, min(RANK, *module.weight.shape))
                setattr(self.transformer.get_submodule(parent), last, self.loras[name])

    def read(self, captions: list[str]) -> Text:
        """Keys [b, 1 + n, d] of the captions and what pads them, for `velocity`."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        with torch.no_grad():
            embedded = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return with_zero_key(embedded, tokens.attention_mask)

    def velocity(self, x: torch.Tensor, level: torch.Tensor, text: Text, *, with_lora: bool) -> torch.Tensor:
        """[b, z, t, 8, 8] at noise levels [b], or [b, n] for each token."""
        for lora in self.loras.values():
            lora.is_on = with_lora
        keys, self._attention.bias = text
        velocity: torch.Tensor = self.transformer(x, 1000 * level, keys, return_dict=False)[0]
        return velocity

    def guided(self, x: torch.Tensor, level: torch.Tensor, text: Text, nothing: Text) -> torch.Tensor:
        """The teacher's velocity."""
        plain = self.velocity(x, level, nothing, with_lora=False)
        return plain + GUIDANCE * (self.velocity(x, level, text, with_lora=False) - plain)


def is_changed(name: str) -> bool:
    """Whether the LoRA changes this linear layer of the transformer."""
    return name.startswith("blocks.") or name in ("condition_embedder.time_proj", "proj_out")


@dataclass
class Batch:
    """Videos on their way: `x` [S, b, z, t, 8, 8] before each step, and in `target` the velocity to take there."""

    x: torch.Tensor
    target: torch.Tensor
    captions: list[str]


@torch.no_grad()
def make_batch(student: Student, rng: np.random.Generator) -> Batch:
    """The student's own way from noise, and where the teacher goes from each of its states."""
    num_latents = int(rng.integers(WINDOW_LATENTS[0], WINDOW_LATENTS[1] + 1))
    size = max(2, round(TOKENS_PER_STEP / (TOKENS_PER_LATENT * num_latents)))
    known, grid = training_prompts(), levels()
    captions = [known[int(i)].caption for i in rng.integers(len(known), size=size)]
    text, nothing = student.read(captions), student.read([""] * size)
    shape = (size, student.transformer.config.in_channels, num_latents, 8, 8)
    states, targets = [torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))], []
    for here, there in pairwise(grid):
        x, half = states[-1], (here + there) / 2
        first = student.guided(x, torch.full((size,), here), text, nothing)
        targets.append(student.guided(x + (half - here) * first, torch.full((size,), half), text, nothing))
        if there > 0:
            velocity = student.velocity(x, torch.full((size,), here), text, with_lora=True)
            states.append(x + (there - here) * velocity)
    return Batch(torch.stack(states).half(), torch.stack(targets).half(), captions)


def loss_of(student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
    """Mean square error of the velocity at one step of each video, the object weighing more than the flat background."""
    if rng.uniform() < AS_BLOCKS and batch.x.shape[3] > RIGHT_LATENTS[1]:
        return _loss_as_blocks(student, batch, rng)
    size = len(batch.captions)
    step, each = torch.from_numpy(rng.choice(NUM_STEPS, size=size, p=LEVEL_SHARES)), torch.arange(size)
    x, target, level = batch.x[step, each].float(), batch.target[step, each].float(), torch.tensor(levels())[step]
    return _loss(student.velocity(x, level, student.read(batch.captions), with_lora=True), x, target, level)


def _loss_as_blocks(student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
    """The same of windows whose last latents, the next block's, are a step behind; at the first step it has not entered."""
    num_latents, size = batch.x.shape[3], len(batch.captions)
    own = num_latents - int(rng.integers(RIGHT_LATENTS[0], RIGHT_LATENTS[1] + 1))
    step = int(rng.choice(NUM_STEPS, p=LEVEL_SHARES))
    x, target = batch.x[step].float()[:, :, :own], batch.target[step].float()[:, :, :own]
    level = torch.full((size, own), levels()[step])
    window, at = x, level
    if step:
        window = torch.cat([x, batch.x[step - 1].float()[:, :, own:]], dim=2)
        at = torch.cat([level, torch.full((size, num_latents - own), levels()[step - 1])], dim=1)
    per_token = at.repeat_interleave(TOKENS_PER_LATENT, dim=1)  # [b, n]
    velocity = student.velocity(window, per_token, student.read(batch.captions), with_lora=True)
    return _loss(velocity[:, :, :own], x, target, level[:, 0])


def _loss(velocity: torch.Tensor, x: torch.Tensor, target: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    s = level.view(-1, 1, 1, 1, 1)
    return (object_weight(x - s * target, s) * (velocity - target).square()).mean()


def training_steps(work: Path, seed: int, num_steps: int, deadline_s: float = math.inf) -> Iterator[tuple[int, Student, Ema]]:
    """Train from the last checkpoint in `work`, or from the start, until `num_steps` or `deadline_s` (of `time.time`); the
    rate falls with whichever is nearer. Yields after every checkpoint: steps done, student, averaged LoRA."""
    torch.manual_seed(seed)
    student = Student()
    matrices = nn.ModuleDict({name.replace(".", "/"): lora for name, lora in student.loras.items()})
    trained = [parameter for parameter in matrices.parameters() if parameter.requires_grad]
    optimizer, ema = Muon(trained, lr=PEAK_RATE), Ema(student, 0.99)
    ema.shadow = {name: value for name, value in ema.shadow.items() if name.endswith((".down", ".up"))}
    kept: list[Batch] = []
    log, first = TrainingLog(work / "distill.jsonl"), 0
    if state := load_checkpoint(work / "distill.pt"):
        student.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.step, first = state["ema"], state["step"], state["step"]
        kept = [Batch(**batch) for batch in state["kept"]]
    running, begun_s = 0.0, time.time()
    for step in range(first, num_steps):
        rng = np.random.default_rng((seed, 4, step))
        if step % USES == 0 or not kept:
            kept = [*kept[-KEPT + 1 :], make_batch(student, rng)]
        batch = kept[-1] if step % USES == 0 else kept[int(rng.integers(len(kept)))]
        done_share = max(step / num_steps, _share_of_time(first / num_steps, begun_s, deadline_s))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(round(done_share * num_steps), num_steps, peak=PEAK_RATE, warm_up=30)
        loss = loss_of(student, batch, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        _average(ema, student)
        running += loss.item()
        done, is_over = step + 1, time.time() >= deadline_s
        if done % 10 == 0:
            log.write(step=done, loss=round(running / 10, 5))
            running = 0.0
        if done % 25 == 0 or done == num_steps or is_over:
            save_checkpoint(work / "distill.pt", {
                "lora": {n: v for n, v in student.state_dict().items() if n in ema.shadow}, "ema": ema.shadow, "step": done,
                "optimizer": optimizer.state_dict(), "kept": [vars(one) for one in kept],
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
