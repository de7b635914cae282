"""Attention processors that let a block attend to its neighbours' K and V (METHOD.md, "One sweep", step 2).

They plug into diffusers' `WanAttention`, so that every other line of a layer is upstream's. K and V are cached before
`norm_k` and RoPE, so that position is applied anew wherever the frames come to stand.

Shapes: B guidance halves, n window tokens, m key tokens, L text tokens, D model dim, H heads, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

KeyValue = tuple[torch.Tensor, torch.Tensor]  # K, V: each [B, tokens, D], before norm_k and RoPE


@dataclass
class Surroundings:
    """What the layers of one stage see besides the window, for the block step being run.

    `right[layer]` is the feature cache: K, V of the next block's first latents. `keep` is the token range whose K and V each
    layer leaves in `kept[layer]` for the item that follows. `rope` [m, d / 2] complex: position 0 is the first key.
    """

    rope: torch.Tensor
    right: dict[int, KeyValue] | None = None
    keep: slice | None = None
    kept: dict[int, KeyValue] = field(default_factory=dict)


class SelfAttention:
    """Processor of `attn1` in `layer`: queries from the window, keys and values from [window | right cache]."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.surroundings: Surroundings | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,  # [B, n, D]
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        around = self.surroundings
        assert around is not None, "no block step is being run"
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if around.keep is not None:
            # Copies: a view would hold the whole window's K and V alive.
            around.kept[self.layer] = (key[:, around.keep].clone(), value[:, around.keep].clone())
        if around.right is not None:
            right_key, right_value = around.right[self.layer]
            key = torch.cat([key, right_key], dim=1)  # [B, m, D]
            value = torch.cat([value, right_value], dim=1)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))  # [B, n, H, d]
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(
            rotate(query, around.rope),
            rotate(key, around.rope),
            value.unflatten(2, (attn.heads, -1)),
            backend=self._attention_backend,
        )
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


class CrossAttention:
    """Processor of `attn2`: text K and V depend on prompt and layer only, so they are computed once and kept.

    `encoder_hidden_states` is a key of `texts`, not a tensor.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, texts: dict[int, list[torch.Tensor]]) -> None:
        """`texts[i]`: projected text of each guidance half, [1, L, D]; halves may differ in L."""
        self._texts = texts
        self._key_values: dict[int, list[KeyValue]] = {}

    def forget(self) -> None:
        """Drop the text K and V of the job that has ended."""
        self._key_values.clear()

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,  # [B, n, D]
        encoder_hidden_states: int,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        text = encoder_hidden_states
        if text not in self._key_values:
            self._key_values[text] = [self._project(attn, half) for half in _batched(self._texts[text])]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))  # [B, n, H, d]
        groups = self._key_values[text]
        queries = query.split([key.shape[0] for key, _ in groups])
        out = [
            dispatch_attention_fn(query, key, value, backend=self._attention_backend)
            for query, (key, value) in zip(queries, groups, strict=True)
        ]
        joined = torch.cat(out) if len(out) > 1 else out[0]
        return attn.to_out[0](joined.flatten(2, 3).type_as(hidden_states))

    @staticmethod
    def _project(attn: WanAttention, text: torch.Tensor) -> KeyValue:
        key = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))  # [B, L, H, d]
        return key, attn.to_v(text).unflatten(2, (attn.heads, -1))


def _batched(halves: list[torch.Tensor]) -> list[torch.Tensor]:
    """One batch when all halves have the same length, else each by itself (supplied embeddings keep their length)."""
    if len({half.shape[1] for half in halves}) == 1:
        return [torch.cat(halves)]
    return halves


def rotate(heads: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `heads` [B, n, H, d] by `rope` [>= n, d / 2] complex64, as diffusers' WanAttnProcessor."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[: heads.shape[1], None]).flatten(-2).type_as(heads)
