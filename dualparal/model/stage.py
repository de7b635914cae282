"""One stage: a contiguous range of Wan DiT layers with its feature cache, for one or two experts.

Follows `WanTransformer3DModel.forward` (diffusers), cut at layer borders. The first stage owns the patch and condition
embedding, the last the output head. Knows no rank and no queue: the runtime feeds it items of the schedule in order.

Shapes: B guidance halves (cond[, uncond]), C latent channels, F window frames, h x w latent picture, p tokens per frame,
n = F * p window tokens, D model dim, S steps.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel

from dualparal.method.grid import Ring
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Context, Item, Schedule
from dualparal.method.timeline import TextsAtHand
from dualparal.model.checkpoint import DTYPES, keeps_float32, load_transformer_share
from dualparal.model.feature_cache import CrossAttention, KeyValue, SelfAttention, Surroundings
from dualparal.model.host_cache import CacheMover, HostCache
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_beside import LorasBeside
from dualparal.model.lora_source import Lora
from dualparal.model.low_memory import Handover, Layers, offload_layers
from dualparal.model.speedups import compile_layers, use_attention
from dualparal.model.token_times import modulation, with_clean


@dataclass(frozen=True)
class Conditions:
    """What steps and prompts mean to one expert, computed once per job by the first stage's condition embedder.

    `temb` [S, D] for the output head, `timestep_proj` [S, 6, D] for the layers (S + 1 where tokens have timesteps of their own:
    the last is 0); `texts[i]` is text i as a list of guidance
    halves, each [1, L, D] (halves may differ in L). Texts numbered after these are heard of later (`Stage.hear`).
    """

    temb: torch.Tensor
    timestep_proj: torch.Tensor
    texts: list[list[torch.Tensor]]


@dataclass(frozen=True)
class JobShape:
    """The geometry every stage needs: `text_of_block[b]` is the text that block b listens to."""

    height: int  # of the latents
    width: int
    num_halves: int
    guidance_scales: tuple[float, float]  # of expert 0 and 1
    text_of_block: tuple[int, ...]


class Stage:
    """Layers `layers` of every expert, on one device. `begin` a job, `run` its items in schedule order, `end` it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: range,
        *,
        dtype: str,
        device: str,
        loras: Sequence[Lora] = (),
        attention: str | None = None,
        is_compiled: bool = False,
        quantization: str | None = None,
        is_offloaded: bool = False,
        is_cache_offloaded: bool = False,
        lora_cache_bytes: int = 0,
        ring: Ring = None,
    ) -> None:
        """`attention` is a backend of diffusers' dispatcher, `is_compiled` runs the layers through torch.compile,
        `quantization` (fp8, int8) stores their weights in 8 bits: all three change bits. `is_offloaded` layers wait in host
        memory, and with `is_cache_offloaded` so do K and V between a block's pass and its right neighbour's. `loras` are
        merged for good; of those of single jobs (`use_loras`) `lora_cache_bytes` are kept in host memory. Of
        two rings it is in `ring`: its predictions are of one guidance half, as they are. Raises `CheckpointError` for a bad
        file, `RequestError` for a backend that is not to be had."""
        self.layers, self.ring = layers, ring
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.is_first = layers.start == 0
        self.is_last = layers.stop == checkpoint.num_layers
        home = torch.device("cpu") if is_offloaded else self.device
        self.models: list[WanTransformer3DModel] = [
            load_transformer_share(
                checkpoint,
                component,
                layers,
                dtype=self.dtype,
                device=home,
                loras=loras,
                quantization=quantization,
                is_pinned=is_offloaded and self.device.type == "cuda",
            )
            for component in checkpoint.transformers
        ]
        self._beside = LorasBeside(self.models, self._dtype_of, self.device, lora_cache_bytes)
        config = checkpoint.config("transformer")
        self.patch_size: tuple[int, int, int] = tuple(config.get("patch_size", (1, 2, 2)))
        self.dim = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        self.channels = int(config["in_channels"])
        self.has_token_times = checkpoint.has_token_times
        self.max_frames = int(config.get("rope_max_seq_len") or 1024)
        self._texts: list[dict[int, list[torch.Tensor]]] = [{} for _ in self.models]
        self._crosses: list[list[CrossAttention]] = []
        self._layers: list[Layers] = []
        for model, texts in zip(self.models, self._texts, strict=True):
            own = [(number, model.blocks[number]) for number in layers]
            selves = [SelfAttention(number) for number, _ in own]
            self._crosses.append([CrossAttention(texts) for _ in own])
            for (_, block), attn1, attn2 in zip(own, selves, self._crosses[-1], strict=True):
                block.attn1.set_processor(attn1)
                block.attn2.set_processor(attn2)
            if attention is not None:
                use_attention(model, attention, self.device)
            if is_compiled:
                compile_layers([block for _, block in own])
            self._layers.append(Layers([block for _, block in own], selves))
            if is_offloaded:
                offload_layers(model, self._layers[-1], self.device)
        self._shape: JobShape | None = None
        self._schedule: Schedule | None = None
        self._at_hand: TextsAtHand | None = None
        self._num_known = 0  # texts that are there all the time
        # K/V for other blocks, by guidance half: of the item just before; of each block's last pass.
        self._heads: dict[int | None, dict[int, KeyValue]] = {}
        self._tails: dict[tuple[int, int | None], MutableMapping[int, KeyValue]] = {}
        self._mover = CacheMover(self.device) if is_cache_offloaded else None
        self._cond: torch.Tensor | None = None

    def _dtype_of(self, key: str) -> torch.dtype:
        return torch.float32 if keeps_float32(key) else self.dtype

    def use_loras(self, loras: Sequence[Lora]) -> None:
        """Run from now on with these LoRAs beside the weights, and no others; before `embed_conditions`. Raises
        `CheckpointError` for a file that cannot be used."""
        self._beside.use(loras)

    def embed_conditions(self, timesteps: torch.Tensor, texts: Sequence[Sequence[torch.Tensor]]) -> list[Conditions]:
        """Time and text projections of every expert, on the CPU (they are sent to all ranks). First stage only.

        `timesteps` [S]; `texts[i]` holds the guidance halves of text i, each [1, L, text dim], in any dtype.
        """
        found = []
        timesteps = with_clean(timesteps) if self.has_token_times else timesteps
        with torch.inference_mode():
            for model in self.models:
                embedder = model.condition_embedder
                halves = [[half.to(self.device, self.dtype) for half in text] for text in texts]
                temb, proj, _, _ = embedder(timesteps.to(self.device), halves[0][0])
                projected = [[embedder.text_embedder(half).cpu() for half in text] for text in halves]
                found.append(Conditions(temb.cpu(), proj.unflatten(1, (6, -1)).cpu(), projected))
        return found

    @torch.inference_mode()
    def embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """A text [1, L, text dim] projected by every expert, [experts, L, D]. First stage only."""
        text = text.to(self.device, self.dtype)
        return torch.cat([model.condition_embedder.text_embedder(text) for model in self.models])

    def hear(self, text: int, said: torch.Tensor) -> None:
        """Take up a text as `embed_text` made it, until no block in flight listens to it. Its other half is text 0's."""
        for texts, one in zip(self._texts, said.to(self.device, self.dtype).split(1), strict=True):
            texts[text] = [one.clone(), *texts[0][1:]]

    def is_start_clean(self, plan: BlockPlan) -> bool:
        """Whether block 0 sees what is before it clean, at timestep 0: a picture that the film begins with, by a model that was
        trained for it. Latents of another film are as noisy as the block."""
        return self.has_token_times and plan.is_ghost_shown

    @property
    def tokens_per_frame(self) -> int:
        """p: tokens of one latent frame of the present job."""
        assert self._shape is not None
        return (self._shape.height // self.patch_size[1]) * (self._shape.width // self.patch_size[2])

    def begin(self, shape: JobShape, schedule: Schedule, conditions: Sequence[Conditions]) -> None:
        """Take up a job: position table, time projections and texts move to the device."""
        self.end()
        self._take_up(shape, schedule, conditions)

    def turn(self, shape: JobShape, schedule: Schedule, conditions: Sequence[Conditions]) -> None:
        """Go on with the job by another timeline, whose schedule agrees with the present one so far. K and V of blocks stay,
        texts are heard anew."""
        self._forget_texts()
        self._take_up(shape, schedule, conditions)
        for block, half in list(self._tails):
            if block + 1 == schedule.plan.num_blocks or schedule.plan.begins_scene(
                block + 1
            ):  # the right neighbour that they were kept for does not come
                del self._tails[block, half]

    def _take_up(self, shape: JobShape, schedule: Schedule, conditions: Sequence[Conditions]) -> None:
        self._shape, self._schedule = shape, schedule
        self._at_hand = TextsAtHand(shape.text_of_block, schedule.last_on_ring(self.ring))
        self._num_known = len(conditions[0].texts)
        plan = schedule.plan
        most = max(plan.num_left(b) + plan.lengths[b] + plan.num_right(b) for b in range(plan.num_blocks))
        self._rope = self._rope_table(most)
        self._conditions = [(expert.temb.to(self.device), expert.timestep_proj.to(self.device)) for expert in conditions]
        for texts, expert in zip(self._texts, conditions, strict=True):
            texts.update({i: [half.to(self.device) for half in halves] for i, halves in enumerate(expert.texts)})

    def end(self) -> None:
        """Drop everything that belongs to a job."""
        self._shape = self._schedule = self._at_hand = self._cond = None
        self._heads.clear()
        self._tails.clear()
        if self._mover is not None:
            self._mover.flush()
        if self.device.type == "cuda":  # the codec, a process of its own, may need on this card what this one only keeps
            torch.cuda.empty_cache()
        self._forget_texts()

    def _forget_texts(self) -> None:
        for texts, crosses in zip(self._texts, self._crosses, strict=True):
            texts.clear()
            for cross in crosses:
                cross.forget()

    def _new_tail(self) -> MutableMapping[int, KeyValue]:
        return {} if self._mover is None else HostCache(self._mover)

    def incoming(self, item: Item) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what `run` is given for `item`: the window's latents on the first stage, else activations."""
        assert self._shape is not None and self._schedule is not None
        if not self.is_first:
            return self.hidden_shape(item), self.dtype
        num_frames = sum(self._schedule.window_frames(item))
        return (1, self.channels, num_frames, self._shape.height, self._shape.width), torch.float32

    def hidden_shape(self, item: Item) -> tuple[int, int, int]:
        """[B, n, D] of the activations that pass between stages for `item`."""
        assert self._shape is not None and self._schedule is not None
        num_tokens = sum(self._schedule.window_frames(item)) * self.tokens_per_frame
        return self._num_halves(item), num_tokens, self.dim

    def _num_halves(self, item: Item) -> int:
        assert self._shape is not None
        return self._shape.num_halves if item.half is None and item.is_guided else 1

    def prediction_shape(self, item: Item) -> tuple[int, int, int, int, int]:
        """[1, C, own frames, h, w] of what the last stage returns for `item`."""
        assert self._shape is not None and self._schedule is not None
        return 1, self.channels, self._schedule.plan.lengths[item.block], self._shape.height, self._shape.width

    @torch.inference_mode()
    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        """One item through this stage's layers.

        `incoming`: the window's latents [1, C, F, h, w] float32 on the first stage, else activations [B, n, D]. Returns
        activations [B, n, D]; on the last stage the prediction [1, C, own F, h, w] float32, or None after the first of two
        guidance halves.
        """
        shape, schedule, at_hand = self._shape, self._schedule, self._at_hand
        assert shape is not None and schedule is not None and at_hand is not None, "begin() a job first"
        at_hand.comes(item)
        model = self.models[item.expert]
        temb, timestep_proj = self._conditions[item.expert]
        given = Handover(self._embed(model, incoming, item) if self.is_first else incoming)
        around = self._surroundings(item)
        text = (shape.text_of_block[item.block], item.half if item.is_guided else 0)
        clean = schedule.window_frames(item)[0] if item.block == 0 and self.is_start_clean(schedule.plan) else 0
        times = modulation(timestep_proj, item.step, self.hidden_shape(item)[1], clean * self.tokens_per_frame)
        hidden = self._layers[item.expert](given, text, times, around)
        if item.keeps_head:
            self._heads[item.half] = around.kept_head
        if item.keeps_tail:
            self._tails[item.block, item.half] = around.kept_tail
        if (gone := at_hand.goes(item)) is not None:
            self._forget_text(gone)
        out = self._predict(model, item, hidden, temb[item.step : item.step + 1]) if self.is_last else hidden
        if self.device.type == "cuda":  # who measures the work or waits for it in vain means the work, not its launch
            torch.cuda.current_stream(self.device).synchronize()
        return out

    def _forget_text(self, text: int) -> None:
        """No block in flight listens to it: its K and V go, and with them all of it that was heard on the way."""
        for texts, crosses in zip(self._texts, self._crosses, strict=True):
            for cross in crosses:
                cross.forget(text)
            if text >= self._num_known:
                texts.pop(text, None)

    def _surroundings(self, item: Item) -> Surroundings:
        """Take out what the schedule says this item uses, and say what it is to leave."""
        assert self._schedule is not None
        plan, p = self._schedule.plan, self.tokens_per_frame
        left, own, _ = self._schedule.window_frames(item)
        around = Surroundings(self._rope)
        head = self._heads.pop(item.half, None)  # serves the next item or none
        if item.right is Context.CACHE:
            assert head is not None, "the schedule promised a right cache"
            around.right = head
        if item.left is Context.CACHE:
            key = (item.block - 1, item.half)
            around.left = self._tails.pop(key) if item.frees_left else self._tails[key]
            around.is_left_used_again = not item.frees_left
            if isinstance(around.left, HostCache):
                around.left.fetch(self.layers.start)
        if item.keeps_head:
            around.head = slice(left * p, (left + plan.num_kept(item.block)) * p)
        if item.keeps_tail:
            around.kept_tail = self._new_tail()
            around.tail = slice((left + own - plan.num_left(item.block + 1)) * p, (left + own) * p)
        return around

    def _embed(self, model: WanTransformer3DModel, window: torch.Tensor, item: Item) -> torch.Tensor:
        return embed_patches(model, window.to(self.device, self.dtype), self._num_halves(item))

    def _predict(
        self, model: WanTransformer3DModel, item: Item, hidden: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor | None:
        """Output head on the own frames only, then guidance: uncond + scale * (cond - uncond)."""
        shape, schedule = self._shape, self._schedule
        assert shape is not None and schedule is not None
        left, own, _ = schedule.window_frames(item)
        p = self.tokens_per_frame
        patches = output_head(model, hidden[:, left * p : (left + own) * p], temb)  # [B, own * p, ph * pw * C]
        _, patch_h, patch_w = self.patch_size
        rows, columns = shape.height // patch_h, shape.width // patch_w
        patches = patches.reshape(len(patches), own, rows, columns, patch_h, patch_w, -1)
        out = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # [B, C, own, h, w]
        if shape.num_halves == 1 or not item.is_guided or self.ring is not None:
            return out.contiguous()
        if item.half == 0:
            self._cond = out.contiguous()
            return None
        cond, uncond = out.split(1) if item.half is None else (self._cond, out)
        assert cond is not None
        return self.combine(item, cond, uncond)

    def combine(self, item: Item, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        """The prediction for `item` of its two guidance halves, each [1, C, own F, h, w] float32."""
        assert self._shape is not None
        return uncond + self._shape.guidance_scales[item.expert] * (cond - uncond)

    def _rope_table(self, num_frames: int) -> torch.Tensor:
        """Rotations of `num_frames` latent frames, [num_frames * p, d / 2] complex64; a prefix serves fewer frames."""
        shape = self._shape
        assert shape is not None
        probe = torch.empty(1, 1, num_frames, shape.height, shape.width, device="meta")
        cos, sin = self.models[0].rope(probe)  # [1, n, 1, d], each value twice
        return torch.complex(cos[0, :, 0, 0::2].float(), sin[0, :, 0, 1::2].float()).contiguous()


def embed_patches(model: WanTransformer3DModel, window: torch.Tensor, num_halves: int) -> torch.Tensor:
    """Latents [1, C, F, h, w] in the model's dtype as tokens [B, n, D]: embedded once, the same for each guidance half."""
    tokens = model.patch_embedding(window).flatten(2).transpose(1, 2)  # [1, n, D]
    return tokens.expand(num_halves, -1, -1).contiguous()


def output_head(model: WanTransformer3DModel, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Activations [B, n, D] as patches [B, n, ph * pw * C] float32; `temb` [1, D] of the step."""
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    patches: torch.Tensor = model.proj_out(hidden).float()
    return patches
