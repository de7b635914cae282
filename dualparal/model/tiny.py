"""Writes small random Wan checkpoints in the hub's exact layout: for tests, benchmarks and anyone who wants to try.

Random weights make noise, not pictures; everything else is real: classes, files, configs, sharding, one or two experts.
`python -m dualparal tiny FOLDER` calls `write_tiny_checkpoint`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dualparal.model.parts import INDEX, PARTS, PIPELINE, TRANSFORMERS

VAE_OF_KIND: dict[str, dict[str, Any]] = {
    "t2v": {},
    "ti2v": {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
}


def write_tiny_checkpoint(
    folder: Path,
    *,
    kind: str = "t2v",
    num_experts: int = 1,
    num_layers: int = 4,
    num_heads: int = 2,
    head_dim: int = 12,
    ffn_dim: int = 48,
    z_dim: int = 4,
    vae_dim: int = 4,
    boundary_ratio: float | None = 0.875,
    flow_shift: float = 3.0,
    max_shard_size: str = "10GB",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights drawn from `seed` and return `folder`.

    `kind` is a key of `VAE_OF_KIND`: "t2v" has Wan2.1's VAE, "ti2v" Wan2.2's and timesteps of its tokens' own.
    `num_experts` 2 adds `transformer_2` and `boundary_ratio` (Wan2.2's layout); a small `max_shard_size` ("20KB") splits the
    DiT over several safetensors files with an index. `head_dim` must be even.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component in TRANSFORMERS[:num_experts]:
            dit = WanTransformer3DModel(
                num_attention_heads=num_heads, attention_head_dim=head_dim, in_channels=z_dim, out_channels=z_dim,
                text_dim=32, freq_dim=32, ffn_dim=ffn_dim, num_layers=num_layers, rope_max_seq_len=1024,
            )  # fmt: skip
            _enliven(dit)
            if dtype != torch.float32:
                dit.to(dtype)
            dit.save_pretrained(folder / component, max_shard_size=max_shard_size)
        vae = AutoencoderKLWan(
            base_dim=vae_dim, z_dim=z_dim, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **VAE_OF_KIND[kind],
            latents_mean=[0.1 * i for i in range(z_dim)], latents_std=[1.0 + 0.1 * i for i in range(z_dim)],
        )  # fmt: skip
        vae.save_pretrained(folder / "vae")
        text = UMT5Config(
            vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    _byte_tokenizer().save_pretrained(folder / "tokenizer")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    ).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "_diffusers_version": "0.42.1",
        "boundary_ratio": boundary_ratio if num_experts == 2 else None,
        "expand_timesteps": kind == "ti2v",
        **{name: [part.library, part.class_name or "PreTrainedTokenizerFast"] for name, part in PARTS.items()},
    }
    for component in TRANSFORMERS[num_experts:]:
        index[component] = [None, None]
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _enliven(dit: WanTransformer3DModel) -> None:
    """Larger weights than the default start, so that layers, text, time and neighbours all change the output visibly."""
    for name, parameter in dit.named_parameters():
        if parameter.ndim > 1 and "scale_shift_table" not in name:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    # Guided predictions of about the size a trained model makes: latents stay of order 1 over 50 steps.
    with torch.no_grad():
        dit.proj_out.weight *= 0.1


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, </s> at the end: any prompt is in its vocabulary."""
    words = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
