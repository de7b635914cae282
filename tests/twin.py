"""A slow, obvious statement of METHOD.md in one process: what the engine's latents are compared with.

Written from METHOD.md alone. It shares no line with `dualparal`: own block plan, noise, order of steps, attention, rotary
positions and guidance, in explicit loops. Of diffusers it uses the layers' linear, norm and embedding modules, the table of
rotary angles and the scheduler.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor


class Twin:
    """The method for one checkpoint folder, float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "model_index.json").read_text())
        names = ["transformer"] + (["transformer_2"] if index["transformer_2"][0] is not None else [])
        self.experts = [WanTransformer3DModel.from_pretrained(folder / name).eval() for name in names]

    @torch.no_grad()
    def run(
        self,
        *,
        latents_num: int,
        num_per_block: int,
        num_cat: int,
        steps: int,
        texts: Sequence[Sequence[Tensor]],
        text_of_block: Sequence[int] | None = None,
        guidance: tuple[float, float] = (5.0, 5.0),
        boundary_ratio: float | None = None,
        flow_shift: float = 3.0,
        solver: str = "unipc",
        seed: int = 0,
        size: tuple[int, int] = (4, 4),
        context: str = "recomputed",
        left_context: str = "latest",
        max_in_flight: int = 10**9,
        stagger: int = 1,
        guided_steps: tuple[int, int] | None = None,
        step_cache: tuple[int, int, int, int | None] | None = None,
        refresh: int = 0,
        scenes: Sequence[Sequence[int]] | None = None,
        ghost: Tensor | None = None,
        is_ghost_clean: bool = False,
    ) -> dict[int, Tensor]:
        """Final latents of each block. `texts[i]` is [conditional] or [conditional, unconditional] embeddings.

        `step_cache`: interval, order, number of first steps computed in every mode, step from which on all are (the last is).
        `refresh`: after so many sweeps in which nothing is skipped, the next such one in which no block with more steps to come
        has lost its left neighbour recomputes all left context; the first such one at all after `steps` more. `scenes`: the
        latents of each scene's shots. `ghost`: latents before the first block, which is then no longer than others; a clean
        one is at timestep 0.
        """
        lengths, cuts = block_lengths(latents_num, num_per_block, num_cat), [0]
        if scenes is not None:
            lengths, later = scene_lengths(scenes, num_per_block, num_cat)
            cuts += later  # blocks that nothing precedes
        elif ghost is not None:
            lengths = [min(num_per_block, latents_num - at) for at in range(0, latents_num, num_per_block)]
        num_blocks = len(lengths)
        channels = self.experts[0].config.in_channels
        now = dict(enumerate(initial_noise(lengths, num_per_block, num_cat, (channels, *size), seed, cuts)))
        schedulers = {block: self._scheduler(solver, steps, flow_shift) for block in range(num_blocks)}
        timesteps = schedulers[0].timesteps
        done = dict.fromkeys(range(num_blocks), 0)  # steps done by each block

        history = {(block, 0): now[block].clone() for block in range(num_blocks)}  # latents of (block, steps done)
        last_pass: dict[Any, tuple[Any, Tensor, Tensor]] = {}  # (block, layer, half) -> mode, K, V of the own last num_cat
        known: dict[int, list[tuple[int, Tensor]]] = {}  # block -> steps and predictions computed in its present mode
        last_mode: dict[int, Any] = {}
        in_mode = dict.fromkeys(range(num_blocks), 0)  # steps done by each block in its present mode

        sweep = 0
        entered = 0
        whole_sweeps = 0  # in which nothing was skipped, since the last refresh
        while any(count < steps for count in done.values()):
            unfinished = [block for block in range(entered) if done[block] < steps]
            is_far_ahead = entered == 0 or done[entered - 1] >= min(stagger, steps)
            if entered < num_blocks and len(unfinished) < max_in_flight and is_far_ahead:
                entered += 1
            in_flight = [block for block in range(entered) if done[block] < steps]
            before = {block: now[block].clone() for block in range(num_blocks)}  # all latents as this sweep finds them
            ran_on: dict[int, Any] = {}  # block -> mode (expert, whether guided), in this sweep
            memory: dict[Any, tuple[Tensor, Tensor]] = {}  # (block, layer, expert, half) -> K, V left in this sweep
            modes: dict[int, Any] = {}
            skipping: list[int] = []
            for block in in_flight:
                t = timesteps[done[block]]
                low = boundary_ratio is not None and t < boundary_ratio * schedulers[block].config.num_train_timesteps
                modes[block] = (int(low), guided_steps is None or guided_steps[0] <= done[block] < guided_steps[1])
                if last_mode.get(block) != modes[block]:
                    last_mode[block], known[block], in_mode[block] = modes[block], [], 0
                if step_cache is not None and is_skipped(step_cache, sweep, done[block], in_mode[block], steps):
                    skipping.append(block)
            if not skipping:
                lost = [b for b in in_flight if b not in cuts and b - 1 not in in_flight and done[b] < steps - 1]
                if refresh > 0 and (whole_sweeps >= refresh + steps or (whole_sweeps >= refresh and not lost)):
                    last_pass.clear()
                    whole_sweeps = 0
                whole_sweeps += 1
            for block in sorted(in_flight, reverse=True):
                t, mode = timesteps[done[block]], modes[block]
                expert, guided = mode
                if block in skipping:
                    prediction = extrapolated(known[block], done[block], step_cache[1])
                    step = schedulers[block].step(prediction, t, now[block].clone(), return_dict=False)
                    now[block] = step[0].clone()
                    done[block] += 1
                    in_mode[block] += 1
                    history[block, done[block]] = now[block].clone()
                    continue
                left, left_pass = None, None
                if block not in cuts and num_cat > 0:
                    seen = before[block - 1] if left_context == "latest" else history[block - 1, done[block]]
                    left = seen[:, :, max(0, lengths[block - 1] - num_cat) :]
                    if context == "cached" and (block - 1, 0, 0) in last_pass and last_pass[block - 1, 0, 0][0] == mode:
                        left, left_pass = None, block - 1
                if block == 0 and ghost is not None:
                    sigma = float(schedulers[block].sigmas[done[block]])
                    left = (1 - sigma) * ghost + sigma * ghost_noise(seed, done[block], ghost.shape)
                    left = ghost if is_ghost_clean else left
                right, has_cache = None, False
                if num_cat > 0 and block + 1 in in_flight and block + 1 not in cuts:
                    if ran_on.get(block + 1) == mode:
                        has_cache = True
                    else:
                        right = before[block + 1][:, :, :num_cat]
                pieces = [piece for piece in (left, now[block], right) if piece is not None]
                num_left = 0 if left is None else left.shape[2]
                text = texts[text_of_block[block] if text_of_block else 0]
                outputs = []
                for half, embedding in enumerate(text if guided else text[:1]):
                    outputs.append(
                        self._forward(
                            expert, torch.cat(pieces, dim=2), t, embedding, memory, block=block, half=half,
                            num_left=num_left, num_own=lengths[block], num_cat=num_cat, has_cache=has_cache,
                            last_pass=last_pass, left_pass=left_pass, mode=mode,
                            num_clean=num_left if block == 0 and is_ghost_clean else 0,
                        )
                    )  # fmt: skip
                prediction = outputs[0]
                if len(outputs) == 2:
                    prediction = outputs[1] + guidance[expert] * (outputs[0] - outputs[1])
                ran_on[block] = mode
                step = schedulers[block].step(prediction.clone(), t, now[block].clone(), return_dict=False)
                now[block] = step[0].clone()
                known[block].append((done[block], prediction.clone()))
                done[block] += 1
                in_mode[block] += 1
                history[block, done[block]] = now[block].clone()
            sweep += 1
        return now

    def _scheduler(self, solver: str, steps: int, flow_shift: float) -> Any:
        if solver == "euler":
            euler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
            euler.set_timesteps(sigmas=[(steps - step) / steps for step in range(steps)])
            return euler
        kind = DPMSolverMultistepScheduler if solver == "dpm++" else UniPCMultistepScheduler
        scheduler = kind.from_pretrained(self.folder / "scheduler", flow_shift=flow_shift)
        scheduler.set_timesteps(steps)
        return scheduler

    def _forward(
        self, expert: int, window: Tensor, t: Tensor, embedding: Tensor, memory: dict[Any, tuple[Tensor, Tensor]],
        *, block: int, half: int, num_left: int, num_own: int, num_cat: int, has_cache: bool,
        last_pass: dict[Any, tuple[Any, Tensor, Tensor]], left_pass: int | None, mode: Any, num_clean: int,
    ) -> Tensor:  # fmt: skip
        """One pass of one guidance half through all layers; returns the own frames' part of the output."""
        model = self.experts[expert]
        height, width = window.shape[3:]
        _, patch_h, patch_w = model.config.patch_size
        rows, columns = height // patch_h, width // patch_w
        per_frame = rows * columns
        x = model.patch_embedding(window).flatten(2).transpose(1, 2)  # frame-major tokens
        temb, projected, text, _ = model.condition_embedder(t.reshape(1), embedding, None)
        of_clean = model.condition_embedder(torch.zeros(1), embedding, None)[1].reshape(6, -1)
        modulation = torch.stack(  # of each token, [6, n, D]
            [of_clean if token < num_clean * per_frame else projected.reshape(6, -1) for token in range(x.shape[1])], dim=1
        )
        for number, layer in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = layer.scale_shift_table[0][:, None] + modulation

            y = layer.norm1(x) * (1 + scale1) + shift1
            query, key, value = layer.attn1.to_q(y), layer.attn1.to_k(y), layer.attn1.to_v(y)
            own_first = slice(num_left * per_frame, (num_left + min(num_cat, num_own)) * per_frame)
            memory[block, number, expert, half] = (key[:, own_first].clone(), value[:, own_first].clone())
            own_last = slice((num_left + max(0, num_own - num_cat)) * per_frame, (num_left + num_own) * per_frame)
            tail = (mode, key[:, own_last].clone(), value[:, own_last].clone())
            num_before = 0  # tokens of the left cache
            if left_pass is not None:
                _, left_key, left_value = last_pass[left_pass, number, half]
                num_before = left_key.shape[1]
                key, value = torch.cat([left_key, key], dim=1), torch.cat([left_value, value], dim=1)
            last_pass[block, number, half] = tail
            if has_cache:
                cached_key, cached_value = memory[block + 1, number, expert, half]
                key, value = torch.cat([key, cached_key], dim=1), torch.cat([value, cached_value], dim=1)
            query, key = layer.attn1.norm_q(query), layer.attn1.norm_k(key)
            query = self._rotate(query, model, rows, columns, first=num_before)
            key = self._rotate(key, model, rows, columns)
            x = x + layer.attn1.to_out[0](attention(query, key, value, layer.attn1.heads)) * gate1

            y = layer.norm2(x)
            query = layer.attn2.norm_q(layer.attn2.to_q(y))
            key, value = layer.attn2.norm_k(layer.attn2.to_k(text)), layer.attn2.to_v(text)
            x = x + layer.attn2.to_out[0](attention(query, key, value, layer.attn2.heads))

            y = layer.norm3(x) * (1 + scale2) + shift2
            x = x + layer.ffn(y) * gate2
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        tokens = model.proj_out(model.norm_out(x) * (1 + scale) + shift)[0]  # [n, patch_h * patch_w * C]
        out = torch.empty(1, model.config.out_channels, num_own, height, width)
        for frame in range(num_own):
            for row in range(rows):
                for column in range(columns):
                    token = tokens[((num_left + frame) * rows + row) * columns + column]
                    patch = token.reshape(patch_h, patch_w, -1).permute(2, 0, 1)  # [C, patch_h, patch_w]
                    top, start = row * patch_h, column * patch_w
                    out[0, :, frame, top : top + patch_h, start : start + patch_w] = patch
        return out

    @staticmethod
    def _rotate(tokens: Tensor, model: WanTransformer3DModel, rows: int, columns: int, first: int = 0) -> Tensor:
        """Rotary positions: frame, row and column, the first token standing at place `first`, by upstream's table."""
        heads = model.config.num_attention_heads
        rope = model.rope
        t_dim, h_dim = rope.t_dim, rope.h_dim
        cos_table, sin_table = rope.freqs_cos.float(), rope.freqs_sin.float()
        place = torch.arange(first, first + tokens.shape[1])
        frame, row, column = place // (rows * columns), place // columns % rows, place % columns
        ends = (slice(0, t_dim), slice(t_dim, t_dim + h_dim), slice(t_dim + h_dim, None))
        cos = torch.cat([cos_table[at][:, end] for at, end in zip((frame, row, column), ends, strict=True)], dim=1)
        sin = torch.cat([sin_table[at][:, end] for at, end in zip((frame, row, column), ends, strict=True)], dim=1)
        x = tokens.unflatten(2, (heads, -1))  # [1, n, H, d]
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, None, 0::2], sin[:, None, 0::2]  # the table holds each value twice
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).flatten(2)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head; [1, n, D] each."""
    out = []
    for q, k, v in zip(query.chunk(heads, 2), key.chunk(heads, 2), value.chunk(heads, 2), strict=True):
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=-1)
        out.append(weights @ v)
    return torch.cat(out, dim=2)


def is_skipped(step_cache: tuple[int, int, int, int | None], sweep: int, step: int, num_in_mode: int, num_steps: int) -> bool:
    """Computed are: the first steps of a mode, the last steps, and every interval-th sweep, the one after the first skipped."""
    interval, _, first, last = step_cache
    if num_in_mode < first or step == num_steps - 1 or (last is not None and step >= last):
        return False
    computed = range(first + 1 - interval * (first + 1), sweep + 1, interval)
    return sweep not in computed


def extrapolated(known: Sequence[tuple[int, Tensor]], step: int, order: int) -> Tensor:
    """TaylorSeer: sum over i of (steps since the last prediction)^i / i! times its i-th difference per step."""

    def difference(i: int, which: int) -> Tensor:
        if i == 0:
            return known[which][1]
        return (difference(i - 1, which) - difference(i - 1, which - 1)) / (known[which][0] - known[which - 1][0])

    newest = len(known) - 1
    since = step - known[newest][0]
    out = torch.zeros_like(known[newest][1])
    for i in range(min(order, newest) + 1):
        out += difference(i, newest) * since**i / math.factorial(i)
    return out


def block_lengths(latents_num: int, num_per_block: int, num_cat: int) -> list[int]:
    """A first block of num_per_block + num_cat, then blocks of num_per_block, the last one shorter if need be."""
    lengths: list[int] = []
    while sum(lengths) < latents_num:
        most = num_per_block if lengths else num_per_block + num_cat
        lengths.append(min(most, latents_num - sum(lengths)))
    return lengths


def scene_lengths(scenes: Sequence[Sequence[int]], num_per_block: int, num_cat: int) -> tuple[list[int], list[int]]:
    """Blocks of a film whose scenes have shots of so many latents, and which of them come after a cut.

    A scene's first block is as long as it may be within its shot. The rest of a shot is shared out, latent by latent, over as
    few blocks as can hold it, the first of them getting what does not come out even.
    """
    lengths: list[int] = []
    cuts: list[int] = []
    for number, scene in enumerate(scenes):
        if number:
            cuts.append(len(lengths))
        for place, shot in enumerate(scene):
            left = shot
            if place == 0:
                lengths.append(min(shot, num_per_block + num_cat))
                left -= lengths[-1]
            blocks = [0] * math.ceil(left / num_per_block)
            for latent in range(left):
                blocks[latent % len(blocks)] += 1
            lengths += blocks
    return lengths, cuts


def ghost_noise(seed: int, step: int, shape: Sequence[int]) -> Tensor:
    """The noise of a ghost at one step: drawn from 63 bits of what seed, "ghost" and step make together."""
    bits = int(hashlib.sha256(f"{seed} ghost {step}".encode()).digest()[:8][::-1].hex(), 16) // 2
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(bits))


def texts_by_block(shots: Sequence[tuple[int, Tensor, str]], lengths: Sequence[int]) -> list[Tensor]:
    """The text of each block, of shots of (latents, text, transition). A blend takes three blocks, wherever the shot ends."""
    found: list[Tensor] = []
    for number, (_, new, transition) in enumerate(shots):
        end = sum(shot[0] for shot in shots[: number + 1])
        old = found[-1] if found else new
        k = 0
        while sum(lengths[: len(found)]) < end:
            if transition == "blend" and k < 3 and not old.equal(new):
                alpha = (k + 0.5) / 3
                found.append((1 - alpha) * old + alpha * new)
            else:
                found.append(new)
            k += 1
    return found


def initial_noise(
    lengths: Sequence[int], num_per_block: int, num_cat: int, shape: tuple[int, int, int], seed: int, cuts: Sequence[int] = ()
) -> list[Tensor]:
    """The coordinated noise of METHOD.md, frame by frame. After a cut a new pool is drawn, further on."""
    generator = torch.Generator("cpu").manual_seed(seed)
    channels, height, width = shape
    pool: list[Tensor] = []
    blocks = []
    for block, length in enumerate(lengths):
        if block == 0 or block in cuts:
            drawn = torch.randn(1, channels, num_per_block + num_cat, height, width, generator=generator)
            pool = [drawn[:, :, i : i + 1] for i in range(num_per_block + num_cat)]
        movable, last = pool[: len(pool) - num_cat], pool[len(pool) - num_cat :]
        order = torch.randperm(len(movable), generator=generator).tolist()
        pool = last + [movable[i] for i in order]
        blocks.append(torch.cat(pool[len(pool) - length :], dim=2))
    return blocks
