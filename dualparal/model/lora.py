"""LoRA: the change each file makes to the weights of one stage, merged while they are loaded.

W becomes W + scale * B @ A in float32 before it is cast. Keys are brought to diffusers' names by diffusers' own converters, run
on stand-ins, so that of the file itself only what belongs to this stage's weights is ever read. As in diffusers, changes to
norms (`.diff`) that some files carry are left out, with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.loaders import lora_conversion_utils
from safetensors import safe_open

from dualparal.errors import CheckpointError
from dualparal.model.lora_source import Lora

log = logging.getLogger(__name__)
METADATA_KEY = "lora_adapter_metadata"  # diffusers' own: rank and alpha of a PEFT adapter
COMPONENTS = ("transformer", "transformer_2")
PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)")


@dataclass(frozen=True)
class Source:
    """Where one LoRA tensor lies, and what its converter multiplies it by."""

    key: str
    factor: float


@dataclass(frozen=True)
class LoraFile:
    """One file's tensors as diffusers names them: `modules[component][module][part]`."""

    modules: dict[str, dict[str, dict[str, Source]]]
    metadata: dict[str, Any]

    def alpha_over_rank(self, component: str, module: str, rank: int) -> float:
        """The factor of a PEFT adapter's config; 1 without one."""
        config = {key.removeprefix(f"{component}."): value for key, value in self.metadata.items()}
        if "lora_alpha" not in config:
            return 1.0
        alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        rank = _of_pattern(config.get("rank_pattern") or {}, module, config.get("r", rank))
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


class LoraMerge:
    """The changes that `loras` make to one expert's weights; `apply` them to one tensor after another."""

    def __init__(self, loras: Sequence[Lora], expert: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """`shapes`: every tensor of the whole transformer. Raises `CheckpointError` for a LoRA of another model."""
        self._used = [(lora, file, component) for lora in loras for file, component in _for_expert(lora, expert)]
        for lora, file, component in self._used:
            _check_modules(lora, file.modules[component], shapes)

    def apply(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """`value` of the parameter `key` with every LoRA merged, float32; `value` itself when none touches it."""
        module, _, end = key.rpartition(".")
        for lora, file, component in self._used:
            parts = file.modules[component].get(module, {})
            if end == "weight" and "lora_A.weight" in parts:
                down, up = _read(lora, (parts["lora_A.weight"], parts["lora_B.weight"]))
                scale = lora.scale * file.alpha_over_rank(component, module, down.shape[0])
                delta = (up.flatten(1) @ down.flatten(1)) * scale
                if delta.numel() != value.numel():
                    raise CheckpointError(
                        f"{lora.name}: {module} changes a weight of {list(delta.shape)}, the model's is {list(value.shape)}"
                    )
                value = value.float() + delta.view_as(value)
            elif end == "bias" and "lora_B.bias" in parts:
                (bias,) = _read(lora, (parts["lora_B.bias"],))
                rank = _rank_of(lora, parts)
                value = value.float() + bias * (lora.scale * file.alpha_over_rank(component, module, rank))
        return value


def _for_expert(lora: Lora, expert: int) -> Iterable[tuple[LoraFile, str]]:
    """The part of a file for one expert: by its own names where it has both, else what the file's name says."""
    file = read_lora(lora.file, lora.name)
    if "transformer_2" in file.modules:
        if COMPONENTS[expert] in file.modules:
            yield file, COMPONENTS[expert]
    elif expert in lora.experts:
        yield file, "transformer"


@lru_cache(maxsize=16)
def read_lora(path: str, name: str) -> LoraFile:
    """What a file holds, in diffusers' names. Reads its keys, shapes and alphas only."""
    try:
        with safe_open(path, framework="pt") as opened:
            keys = list(opened.keys())
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
            alphas = {key: opened.get_tensor(key) for key in keys if key.endswith(".alpha")}
            metadata = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    except Exception as error:
        raise CheckpointError(f"{name} cannot be read as safetensors: {error}") from None
    modules: dict[str, dict[str, dict[str, Source]]] = {}
    for full, source in _converted(name, keys, shapes, alphas).items():
        component, _, rest = full.partition(".")
        match = PART.fullmatch(rest)
        if component not in COMPONENTS or match is None:
            raise CheckpointError(f"{name} holds {source.key}, which is no part of a LoRA known here")
        modules.setdefault(component, {}).setdefault(match[1], {})[match[2]] = source
    for component, found in modules.items():
        for module, parts in found.items():
            if len({"lora_A.weight", "lora_B.weight"} & set(parts)) == 1:
                raise CheckpointError(f"{name} has only one of lora_A and lora_B for {component}.{module}")
    return LoraFile(modules, metadata if isinstance(metadata, dict) else {})


def _converted(
    name: str, keys: list[str], shapes: dict[str, tuple[int, ...]], alphas: dict[str, torch.Tensor]
) -> dict[str, Source]:
    """Run diffusers' converter on stand-ins: column 0 is the tensor's number, column 1 a one; what is scaled, scales both."""
    if all(key.startswith(tuple(f"{component}." for component in COMPONENTS)) for key in keys):
        return {key: Source(key, 1.0) for key in keys}
    stand_ins = {
        key: alphas.get(
            key, torch.tensor([[float(number), 1.0]], dtype=torch.float64).repeat(shapes[key][0] if shapes[key] else 1, 1)
        )
        for number, key in enumerate(keys)
    }
    try:
        if any(key.startswith("diffusion_model.") for key in keys):
            if any(key.endswith("head.head.diff") for key in keys):
                raise ValueError("a whole new output head")
            found = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(stand_ins)
        else:
            found = lora_conversion_utils._convert_musubi_wan_lora_to_diffusers(stand_ins)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{name} holds keys that diffusers does not know as a LoRA of Wan: {str(error)[:200]}") from None
    sources = {}
    for key, value in found.items():
        number, factor = value[0].tolist()
        sources[key] = Source(keys[round(number / factor)], factor)
    used = {source.key for source in sources.values()}
    if left_out := [key for key in keys if key not in used and key not in alphas]:
        log.warning("%s: %d tensors are left out, as in diffusers (%s)", name, len(left_out), left_out[0])
    return sources


def _check_modules(lora: Lora, modules: dict[str, dict[str, Source]], shapes: dict[str, tuple[int, ...]]) -> None:
    for module, parts in modules.items():
        ends = {"bias" if part.endswith("bias") else "weight" for part in parts}
        if lost := [end for end in sorted(ends) if f"{module}.{end}" not in shapes]:
            raise CheckpointError(
                f"{lora.name} changes {module}.{lost[0]}, which this model does not have; it is for another one"
            )


def _read(lora: Lora, sources: Iterable[Source]) -> list[torch.Tensor]:
    with safe_open(lora.file, framework="pt") as opened:
        return [opened.get_tensor(source.key).float() * source.factor for source in sources]


def _rank_of(lora: Lora, parts: dict[str, Source]) -> int:
    if "lora_A.weight" not in parts:
        return 1
    with safe_open(lora.file, framework="pt") as opened:
        return int(opened.get_slice(parts["lora_A.weight"].key).get_shape()[0])


def _of_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), default)
