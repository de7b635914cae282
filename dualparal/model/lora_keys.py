"""What a key of a LoRA file speaks of, in whichever way its trainer spells it. Names only: no file, no tensor, no torch.

The same layer is called `transformer.blocks.0.attn1.to_q.lora_A.weight` (diffusers), `base_model.model.blocks...` (PEFT),
`diffusion_model.blocks.0.self_attn.q.lora_down.weight` (the original Wan code), `pipe.dit.blocks...lora_A.default.weight`
(DiffSynth), `lora_unet_blocks_0_self_attn_q.lora_down.weight` (kohya, musubi-tuner; VideoX-Fun has two underscores).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

PREFIXES = {  # what stands before the module, any of them after another: the component it names, if it does
    "base_model.model.": None, "model.diffusion_model.": None, "diffusion_model.": None, "pipe.dit.": None,
    "pipe.dit2.": "transformer_2", "pipe.": None, "dit.": None, "module.": None, "lora_unet__": None, "lora_unet_": None,
    "lora_transformer_2_": "transformer_2", "lora_transformer_": None, "transformer.": "transformer",
    "transformer_2.": "transformer_2",
}  # fmt: skip
PARTS = {  # of a change, by the end of its key
    "bias": r"\.lora_(?:B|up)(?:\.(?!weight)[^.]+)?\.bias|\.diff_b",
    "down": r"\.lora_(?:A|down)(?:\.(?!weight|bias)[^.]+)?(?:\.weight)?|[._]lora\.down\.weight",
    "up": r"\.lora_(?:B|up)(?:\.(?!weight|bias)[^.]+)?(?:\.weight)?|[._]lora\.up\.weight",
    "alpha": r"\.(?:lora_)?alpha",
    "diff": r"\.diff",
    "modulation": r"\.diff_m",
}
_PART = re.compile(rf"(.+?)(?:{'|'.join(f'(?P<{part}>{end})' for part, end in PARTS.items())})")
_BLOCK = re.compile(r"blocks[._](\d+)(?:[._](.+))?")
_LINEAR = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
           "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}  # fmt: skip
IN_BLOCK = {  # the original code's name: diffusers' name, within a layer
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _LINEAR.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _LINEAR.items()},
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm1": "norm1", "norm2": "norm3", "norm3": "norm2",
}  # fmt: skip
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}


@dataclass(frozen=True)
class Place:
    """What a key changes: `part` (of `PARTS`) of `module` in diffusers' names; `component` where the key says it."""

    component: str | None
    module: str
    part: str


def place_of(key: str) -> Place | None:
    """What `key` speaks of; None when it is no part of a LoRA of a Wan transformer."""
    rest, component = key, None
    while prefix := next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None):
        rest, component = rest.removeprefix(prefix), PREFIXES[prefix] or component
    match = _PART.fullmatch(rest)
    if match is None or match.lastgroup is None:
        return None
    module: str | None
    if block := _BLOCK.fullmatch(match[1]):
        inner = _spellings(True).get(block[2]) if block[2] else ""
        module = None if inner is None else f"blocks.{int(block[1])}.{inner}".rstrip(".")
    else:
        module = _spellings(False).get(match[1])
    return Place(component, module, match.lastgroup) if module else None


@cache
def _spellings(is_in_block: bool) -> dict[str, str]:
    """Every spelling of a module's name, dotted or joined by underscores: diffusers' name. `norm2` is diffusers' own."""
    names = IN_BLOCK if is_in_block else OUTSIDE
    found = {new: new for new in names.values()} | {old: new for old, new in names.items() if old not in names.values()}
    return found | {name.replace(".", "_"): new for name, new in found.items()}
