"""Attention processors that let a block attend to its neighbours' K and V (METHOD.md, "One sweep", step 2).

They plug into diffusers' `WanAttention`, so that every other line of a layer is upstream's. K and V are cached after `norm_k`,
which knows no position, and before RoPE, which is applied anew wherever the frames come to stand.

Shapes: B guidance halves, n window tokens, m key tokens, L text tokens, D model dim, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

KeyValue = tuple[torch.Tensor, torch.Tensor]  # K, V: each [B, tokens, D], before RoPE
TextKey = tuple[int, int | None]  # (number of the text, guidance half or None for both)


@dataclass
class Surroundings:
    """What the layers of one stage see besides the window, for the item being run.

    `left[layer]` and `right[layer]`: K, V that passes of the neighbours left there. `head` and `tail`: token ranges of the
    window whose K and V each layer leaves in `kept_head[layer]` and `kept_tail[layer]`. A layer drops its part of a cache when
    it uses it (the left one unless `is_left_used_again`), so that what it leaves behind takes no more room. `rope`
    [>= m, d / 2] complex: position 0 is the first key, the left cache's if there is one.
    """

    rope: torch.Tensor
    left: MutableMapping[int, KeyValue] | None = None
    right: dict[int, KeyValue] | None = None
    head: slice | None = None
    tail: slice | None = None
    is_left_used_again: bool = False
    kept_head: dict[int, KeyValue] = field(default_factory=dict)
    kept_tail: MutableMapping[int, KeyValue] = field(default_factory=dict)

    def take(self, layer: int) -> list[KeyValue | None]:
        """K and V of the two sides for one layer."""
        left = right = None
        if self.left is not None:
            left = self.left[layer] if self.is_left_used_again else self.left.pop(layer)
        if self.right is not None:
            right = self.right.pop(layer)
        return [left, right]


class SelfAttention:
    """Processor of `attn1` in `layer`: queries from the window, keys and values from [left cache | window | right cache]."""

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
        query, key, value = attn.to_q(hidden_states), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        # Copies: a view would hold the whole window's K and V alive.
        if around.head is not None:
            around.kept_head[self.layer] = (key[:, around.head].clone(), value[:, around.head].clone())
        if around.tail is not None:
            around.kept_tail[self.layer] = (key[:, around.tail].clone(), value[:, around.tail].clone())
        sides = around.take(self.layer)
        first = sides[0][0].shape[1] if sides[0] else 0  # position of the first query
        key, value = _between(key, sides, 0), _between(value, sides, 1)  # [B, m, D]
        del sides  # what nobody needs again is gone before attention, where a layer needs most
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))  # [B, n, H, d]
        key = key.unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(
            rotate(query, around.rope[first:]),
            rotate(key, around.rope),
            value.unflatten(2, (attn.heads, -1)),
            backend=self._attention_backend,
        )
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


class CrossAttention:
    """Processor of `attn2`: text K and V depend on prompt and layer only, so they are computed once and kept.

    `encoder_hidden_states` is a `TextKey`, not a tensor.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, texts: dict[int, list[torch.Tensor]]) -> None:
        """`texts[i]`: projected text of each guidance half, [1, L, D]; halves may differ in L."""
        self._texts = texts
        self._key_values: dict[TextKey, list[KeyValue]] = {}

    def forget(self, number: int | None = None) -> None:
        """Drop K and V of that text; of all when the job has ended."""
        self._key_values = {key: kept for key, kept in self._key_values.items() if number is not None and key[0] != number}

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,  # [B, n, D]
        encoder_hidden_states: TextKey,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        text = encoder_hidden_states
        if text not in self._key_values:
            number, half = text
            halves = self._texts[number] if half is None else self._texts[number][half : half + 1]
            self._key_values[text] = [self._project(attn, one) for one in _batched(halves)]
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


def _between(own: torch.Tensor, sides: list[KeyValue | None], which: int) -> torch.Tensor:
    left, right = sides
    parts = [*([left[which]] if left else []), own, *([right[which]] if right else [])]
    return torch.cat(parts, dim=1) if len(parts) > 1 else own


def _batched(halves: list[torch.Tensor]) -> list[torch.Tensor]:
    """One batch when all halves have the same length, else each by itself (supplied embeddings keep their length)."""
    if len({half.shape[1] for half in halves}) == 1:
        return [torch.cat(halves)]
    return halves


def rotate(heads: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `heads` [B, n, H, d] by `rope` [>= n, d / 2] complex64, as diffusers' WanAttnProcessor."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[: heads.shape[1], None]).flatten(-2).type_as(heads)
