"""Every tensor that a checkpoint's parts must hold, by name and shape, from their configs alone; and which stage owns which.

Follows `WanTransformer3DModel`, `AutoencoderKLWan` (diffusers; with `is_residual` Wan2.2's, else Wan2.1's) and
`UMT5EncoderModel` (transformers); tests compare the tables with the real modules. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def transformer_owners(config: Mapping[str, Any]) -> dict[str, int]:
    """Every key of a WanTransformer3DModel's state dict and the layer whose stage owns it.

    -1 stands for the first stage (patch and condition embedding), `num_layers` for the last (output head).
    """
    num_layers = int(config.get("num_layers", 40))
    linear = ("weight", "bias")
    first = [f"patch_embedding.{end}" for end in linear]
    for part in (
        "time_embedder.linear_1",
        "time_embedder.linear_2",
        "time_proj",
        "text_embedder.linear_1",
        "text_embedder.linear_2",
    ):
        first += [f"condition_embedder.{part}.{end}" for end in linear]
    layer = ["scale_shift_table"]
    for attn in ("attn1", "attn2"):
        layer += [f"{attn}.{part}.{end}" for part in ("to_q", "to_k", "to_v", "to_out.0") for end in linear]
        layer += [f"{attn}.norm_q.weight", f"{attn}.norm_k.weight"]
    layer += [f"ffn.net.{part}.{end}" for part in ("0.proj", "2") for end in linear]
    if config.get("cross_attn_norm", True):
        layer += [f"norm2.{end}" for end in linear]
    owners = dict.fromkeys(first, -1)
    for number in range(num_layers):
        owners |= {f"blocks.{number}.{key}": number for key in layer}
    return owners | dict.fromkeys(("proj_out.weight", "proj_out.bias", "scale_shift_table"), num_layers)


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shape of every tensor of a WanTransformer3DModel with this config."""
    dim = int(config.get("num_attention_heads", 40)) * int(config.get("attention_head_dim", 128))
    channels, ffn_dim = int(config.get("in_channels", 16)), int(config.get("ffn_dim", 13824))
    patch = tuple(config.get("patch_size", (1, 2, 2)))
    out = int(config.get("out_channels") or channels) * math.prod(patch)
    linear = {  # by the end of the name: (outputs, inputs)
        "time_embedder.linear_1": (dim, int(config.get("freq_dim", 256))),
        "text_embedder.linear_1": (dim, int(config.get("text_dim", 4096))),
        "time_proj": (6 * dim, dim),
        "ffn.net.0.proj": (ffn_dim, dim),
        "ffn.net.2": (dim, ffn_dim),
        "proj_out": (out, dim),
    }
    shapes: Shapes = {}
    for key in transformer_owners(config):
        module, _, end = key.rpartition(".")
        size = next((size for name, size in linear.items() if module.endswith(name)), (dim, dim))
        if end == "scale_shift_table":
            shapes[key] = (1, 6 if module else 2, dim)
        elif "norm" in module:
            shapes[key] = (dim,)
        elif module == "patch_embedding":
            shapes[key] = (dim, channels, *patch) if end == "weight" else (dim,)
        else:
            shapes[key] = size if end == "weight" else size[:1]
    return shapes


def text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of `UMT5EncoderModel`, whose embedding table has two names: `shared` stands for `encoder.embed_tokens` too."""
    dim, ffn = int(config.get("d_model", 512)), int(config.get("d_ff", 1024))
    heads, inner = int(config.get("num_heads", 6)), int(config.get("num_heads", 6)) * int(config.get("d_kv", 64))
    is_gated = str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated")
    shapes: Shapes = {
        "shared.weight": (int(config.get("vocab_size", 250112)), dim),
        "encoder.final_layer_norm.weight": (dim,),
    }
    for number in range(int(config.get("num_layers", 8))):
        attention, feed = f"encoder.block.{number}.layer.0", f"encoder.block.{number}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (dim, inner)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (
            int(config.get("relative_attention_num_buckets", 32)), heads,
        )  # fmt: skip
        shapes |= {f"{feed}.DenseReluDense.{name}.weight": (ffn, dim) for name in (("wi_0", "wi_1") if is_gated else ("wi",))}
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (dim, ffn)
        shapes |= {f"{part}.layer_norm.weight": (dim,) for part in (attention, feed)}
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of `AutoencoderKLWan`."""
    z_dim, base = int(config.get("z_dim", 16)), int(config.get("base_dim", 96))
    return {
        **_under("encoder", _encoder(config, base, 2 * z_dim)),
        **_conv("quant_conv", 2 * z_dim, 2 * z_dim, (1, 1, 1)),
        **_conv("post_quant_conv", z_dim, z_dim, (1, 1, 1)),
        **_under("decoder", _decoder(config, int(config.get("decoder_base_dim") or base), z_dim)),
    }


def _encoder(config: Mapping[str, Any], base: int, z_dim: int) -> Shapes:
    multiples, in_time = _multiples(config), list(config.get("temperal_downsample", (False, True, True)))
    dims = [base * multiple for multiple in (1, *multiples)]
    is_residual = bool(config.get("is_residual"))
    shapes, block, scale = _conv("conv_in", int(config.get("in_channels", 3)), dims[0]), 0, 1.0
    for level, (before, dim) in enumerate(pairwise(dims)):
        is_halved = level < len(multiples) - 1
        if is_residual:
            for number in range(int(config.get("num_res_blocks", 2))):
                shapes |= _under(f"down_blocks.{level}.resnets.{number}", _residual(dim if number else before, dim))
            if is_halved:
                shapes |= _under(f"down_blocks.{level}.downsampler", _resample(dim, dim, dim if in_time[level] else 0))
            continue
        for _ in range(int(config.get("num_res_blocks", 2))):
            shapes |= _under(f"down_blocks.{block}", _residual(before, dim))
            block, before = block + 1, dim
            if scale in config.get("attn_scales", ()):
                shapes |= _under(f"down_blocks.{block}", _attention(dim))
                block += 1
        if is_halved:
            shapes |= _under(f"down_blocks.{block}", _resample(dim, dim, dim if in_time[level] else 0))
            block, scale = block + 1, scale / 2
    return {**shapes, **_middle(dims[-1]), "norm_out.gamma": (dims[-1], 1, 1, 1), **_conv("conv_out", dims[-1], z_dim)}


def _decoder(config: Mapping[str, Any], base: int, z_dim: int) -> Shapes:
    multiples, in_time = _multiples(config)[::-1], list(config.get("temperal_downsample", (False, True, True)))[::-1]
    dims = [base * multiple for multiple in (multiples[0], *multiples)]
    is_residual = bool(config.get("is_residual"))
    shapes = {**_conv("conv_in", z_dim, dims[0]), **_middle(dims[0])}
    for level, (before, dim) in enumerate(pairwise(dims)):
        before = before // 2 if level and not is_residual else before
        for number in range(int(config.get("num_res_blocks", 2)) + 1):
            shapes |= _under(f"up_blocks.{level}.resnets.{number}", _residual(dim if number else before, dim))
        if level < len(multiples) - 1:
            name, out = ("upsampler", dim) if is_residual else ("upsamplers.0", dim // 2)
            shapes |= _under(f"up_blocks.{level}.{name}", _resample(dim, out, 2 * dim if in_time[level] else 0))
    return {**shapes, "norm_out.gamma": (dims[-1], 1, 1, 1), **_conv("conv_out", dims[-1], int(config.get("out_channels", 3)))}


def _multiples(config: Mapping[str, Any]) -> list[int]:
    return [int(multiple) for multiple in config.get("dim_mult", (1, 2, 4, 4))]


def _middle(dim: int) -> Shapes:
    parts = {"resnets.0": _residual(dim, dim), "attentions.0": _attention(dim), "resnets.1": _residual(dim, dim)}
    return {key: shape for name, part in parts.items() for key, shape in _under(f"mid_block.{name}", part).items()}


def _residual(before: int, dim: int) -> Shapes:
    shapes = {"norm1.gamma": (before, 1, 1, 1), **_conv("conv1", before, dim)}
    shapes |= {"norm2.gamma": (dim, 1, 1, 1), **_conv("conv2", dim, dim)}
    return shapes | (_conv("conv_shortcut", before, dim, (1, 1, 1)) if before != dim else {})


def _attention(dim: int) -> Shapes:
    return {"norm.gamma": (dim, 1, 1), **_conv("to_qkv", dim, 3 * dim, (1, 1)), **_conv("proj", dim, dim, (1, 1))}


def _resample(dim: int, out: int, time: int) -> Shapes:
    return _conv("resample.1", dim, out, (3, 3)) | (_conv("time_conv", dim, time, (3, 1, 1)) if time else {})


def _conv(name: str, before: int, dim: int, kernel: tuple[int, ...] = (3, 3, 3)) -> Shapes:
    return {f"{name}.weight": (dim, before, *kernel), f"{name}.bias": (dim,)}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}
