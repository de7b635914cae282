"""What a LoRA file holds, in diffusers' names, and whether it fits a model: keys, shapes, dtypes, alphas. Reads no weight and
needs no torch, so that a file that cannot be merged is refused before any process starts.

Where diffusers loads a file, the changes are diffusers' own (`_convert_non_diffusers_wan_lora_to_diffusers` and PEFT): alpha
over rank, `diff_b` is a bias, `head.head.diff` a whole change of the output head, changes to norms are left out.
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo, read_header
from dualparal.model.lora_keys import Place, place_of
from dualparal.model.lora_source import Lora
from dualparal.model.parts import SCALED, WHOLE_OR_FP8
from dualparal.model.scales import pair_scales

log = logging.getLogger(__name__)
METADATA_KEY = "lora_adapter_metadata"  # diffusers' own: rank and alpha of a PEFT adapter
COMPONENTS = ("transformer", "transformer_2")
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}


Change = dict[str, TensorInfo]  # of one module: down, up, bias, diff


@dataclass(frozen=True)
class LoraFile:
    """One file's changes: `modules[component][module]`, and what each module's is multiplied by."""

    name: str
    modules: dict[str, dict[str, Change]]
    factors: dict[str, dict[str, tuple[float, float]]]  # of weight and bias; alpha over rank

    def for_expert(self, lora: Lora, expert: int) -> str | None:
        """The component whose changes are for this expert: by the file's own names where it has both, else as `lora` says."""
        if lora.said and expert not in lora.experts:
            return None
        if "transformer_2" in self.modules:
            return COMPONENTS[expert] if COMPONENTS[expert] in self.modules else None
        return "transformer" if expert in lora.experts else None


def check_loras(loras: Sequence[Lora], num_experts: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` for the first of `loras` that cannot be merged into a transformer of these `shapes`."""
    for lora in loras:
        file = read_lora(lora.file, lora.name)
        used = {expert: component for expert in range(num_experts) if (component := file.for_expert(lora, expert))}
        for component in sorted(set(file.modules) - set(used.values())):
            key = next(source.key for change in file.modules[component].values() for source in change.values())
            whose = f"an expert that {'was not meant' if lora.said else 'this model does not have'}"
            if not used:
                raise CheckpointError(f"{lora.name} changes {key}, of {whose}, and nothing else; use the file for this one")
            log.warning("LoRA %s: %s and all else of %s is left out", lora.name, key, whose)
        for component in used.values():
            check_changes(lora.name, file.modules[component], shapes)


def check_changes(name: str, modules: dict[str, Change], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` naming the first key whose weight the model lacks or has in another shape."""
    for module, change in modules.items():
        for part, source in change.items():
            of = "bias" if part == "bias" else "weight"
            shape = shapes.get(f"{module}.{of}")
            if shape is None:
                raise CheckpointError(
                    f"{name} changes {source.key}, the {of} of {module}, which this model does not have; it is for another one"
                )
            wanted = {"down": shape[1:], "up": shape[:1]}.get(part, shape)
            given = {"down": source.shape[1:], "up": source.shape[:1] + source.shape[2:]}.get(part, source.shape)
            if _trimmed(given, len(wanted)) != wanted:
                raise CheckpointError(
                    f"{name}: {source.key} of shape {list(source.shape)} changes a {of} of {_size(given)}, the model's has "
                    f"{_size(wanted)} there ({list(shape)}); it is for another model"
                )


def _trimmed(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """`shape` without the ones of a 1 x 1 convolution behind the first `most` numbers."""
    return shape[:most] if all(size == 1 for size in shape[most:]) else shape


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def read_lora(path: str, name: str) -> LoraFile:
    """What a file holds, in diffusers' names. Raises `CheckpointError` naming the first key that cannot be merged."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise CheckpointError(f"LoRA {name} cannot be read: {error.strerror}; put it back or leave it out") from None
    return _read_lora(path, name, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_lora(path: str, name: str, version: tuple[int, ...]) -> LoraFile:
    tensors = pair_scales(read_header(Path(path)))
    if not tensors:
        raise CheckpointError(f"{name} is empty: it holds no LoRA")
    found: dict[tuple[str, str], Change] = {}
    places = _places(name, tensors)
    left_out = []
    for key, place in places.items():
        if _is_left_out(place, places.values()):
            left_out.append(key)
            continue
        parts = found.setdefault((place.component or "transformer", place.module), {})
        if place.part in parts:
            raise CheckpointError(f"{name} holds {parts[place.part].key} and {key}, two changes of the same; use one of them")
        parts[place.part] = tensors[key]
    if not found:
        raise CheckpointError(f"{name} changes nothing: {left_out[0]} and all else in it is left out, as in diffusers")
    settings = _settings(path, name, tensors)
    alphas = _numbers(path, name, [key for key, place in places.items() if place.part == "alpha"])
    modules: dict[str, dict[str, Change]] = {}
    factors: dict[str, dict[str, tuple[float, float]]] = {}
    for (component, module), parts in found.items():
        if module == "proj_out" and "diff" in parts and parts.keys() & {"down", "up"}:
            left_out += [parts.pop(part).key for part in ("down", "up", "alpha") if part in parts]
        _check_parts(name, parts)
        factor = _factor(name, settings.get(component, {}), alphas, module, parts)
        parts.pop("alpha", None)
        modules.setdefault(component, {})[module] = parts
        factors.setdefault(component, {})[module] = factor
    if left_out:
        log.warning("%s: %d tensors are left out, as in diffusers (%s)", name, len(left_out), left_out[0])
    return LoraFile(name, modules, factors)


def _places(name: str, tensors: Iterable[str]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    strange = []
    for key in sorted(tensors):
        place = place_of(key)
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise CheckpointError(f"{name} is a DoRA ({key}), which cannot be merged here; use a plain LoRA")
        if place is None:
            strange.append(key)
        else:
            places[key] = place
    if strange:
        raise CheckpointError(
            f"{name} {'holds' if places else 'does not look like a LoRA of a Wan transformer: it holds'} {strange[0]} "
            f"({len(strange)} of {len(strange) + len(places)} keys are such), which is no part of a LoRA known here; "
            "docs/models.md lists the layouts that load"
        )
    return places


def _is_left_out(place: Place, places: Iterable[Place]) -> bool:
    """What diffusers does not merge either."""
    if place.part == "modulation" or (place.part in ("diff", "bias") and "norm" in place.module):
        return True
    if place.part == "diff":
        return place.module != "proj_out"
    if place.part == "bias" and place.module.endswith("time_proj"):
        return not any(other.module == place.module and other.part in ("down", "up") for other in places)
    return False


def _check_parts(name: str, parts: Change) -> None:
    """Raise `CheckpointError` unless the parts of one module's change go with each other."""
    for part, source in parts.items():
        if part != "alpha" and source.dtype not in (SCALED if source.scale else WHOLE_OR_FP8):
            raise CheckpointError(
                f"{name}: {source.key} is stored as {source.dtype}{'' if source.scale else ' without a scale'}; a LoRA has "
                f"{', '.join(sorted(WHOLE_OR_FP8))}"
            )
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        if lonely := down or up:
            raise CheckpointError(
                f"{name} has only one of lora_A and lora_B: {lonely.key} has no other half; download it again"
            )
        if "alpha" in parts:
            raise CheckpointError(f"{name} has {parts['alpha'].key} and no weights that it belongs to; download it again")
        return
    if len(down.shape) < 2 or len(up.shape) < 2:
        lost = down if len(down.shape) < 2 else up
        raise CheckpointError(f"{name}: {lost.key} has the shape {list(lost.shape)}; a LoRA's matrices have two sides")
    if down.shape[0] == 0:
        raise CheckpointError(f"{name}: {down.key} has rank 0: it changes nothing; leave the LoRA out")
    if down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{name}: {down.key} has rank {down.shape[0]} and {up.key} rank {up.shape[1]}; the two do not go together"
        )


def _factor(name: str, settings: dict[str, Any], alphas: dict[str, float], module: str, parts: Change) -> tuple[float, float]:
    """What a weight's and a bias's change are multiplied by: alpha over rank by the module's own alpha, which concerns
    the weight only, by the adapter's settings, or 1."""
    rank = parts["down"].shape[0] if "down" in parts else None
    if "alpha" in parts:
        assert rank is not None
        return _checked(name, parts["alpha"].key, alphas[parts["alpha"].key]) / rank, 1.0
    if settings.get("lora_alpha") is None:
        return 1.0, 1.0
    try:
        alpha = _of_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
        stated = _of_pattern(settings.get("rank_pattern") or {}, module, settings.get("r", rank))
        alpha, stated = float(alpha), 1 if stated is None else int(stated)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{name}: the adapter's settings (lora_alpha, rank_pattern) make no sense: {error}") from None
    if rank is not None and rank != stated:
        raise CheckpointError(f"{name}: {parts['down'].key} has rank {rank}, the adapter's settings say {stated}")
    if stated < 1:
        raise CheckpointError(f"{name}: the adapter's settings say rank {stated} for {module}; a rank is 1 or more")
    factor = _checked(name, f"lora_alpha of {module}", alpha) / (math.sqrt(stated) if settings.get("use_rslora") else stated)
    return factor, factor


def _checked(name: str, what: str, alpha: float) -> float:
    if not (math.isfinite(alpha) and alpha > 0):
        why = "it would change nothing" if alpha == 0 else "a LoRA's alpha is a positive number"
        raise CheckpointError(f"{name}: {what} is {alpha:g}; {why}")
    return alpha


def _settings(path: str, name: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The adapter's settings by component: from the file's own metadata (diffusers), else from PEFT's file beside it."""
    text = _header_of(path)[0].get("__metadata__", {}).get(METADATA_KEY)
    beside = Path(path).parent / "adapter_config.json"
    is_peft = all(key.startswith("base_model.model.") for key in keys)
    if text is None and is_peft and not beside.is_file():
        log.warning("%s has no adapter_config.json beside it: its alpha is taken to be its rank", name)
    if text is None and not (is_peft and beside.is_file()):
        return {}
    try:
        found = json.loads(beside.read_text(encoding="utf-8") if text is None else text)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name}: the adapter's settings cannot be read ({error}); download it again") from None
    settings: dict[str, dict[str, Any]] = {}
    for component in COMPONENTS:
        inside = {key.removeprefix(f"{component}."): value for key, value in found.items() if key.startswith(f"{component}.")}
        settings[component] = found if text is None else inside
    for one in settings.values():
        if one.get("use_dora"):
            raise CheckpointError(f"{name} is a DoRA (use_dora in its settings), which cannot be merged here; use a plain LoRA")
        if str(one.get("peft_type") or "LORA").rpartition(".")[2] != "LORA":
            raise CheckpointError(f"{name} is a {one['peft_type']}, not a LoRA; use a plain LoRA")
    return settings


def _of_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), default)


def _header_of(path: str) -> tuple[dict[str, Any], int]:
    """A file's header and the byte where its data begin."""
    with Path(path).open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return json.loads(opened.read(length)), 8 + length


def _numbers(path: str, name: str, keys: Iterable[str]) -> dict[str, float]:
    """The one number that each of the tensors `keys` holds."""
    header, start = _header_of(path)
    found = {}
    with Path(path).open("rb") as opened:
        for key in keys:
            dtype, (begin, end) = header[key]["dtype"], header[key]["data_offsets"]
            if dtype not in _NUMBERS:
                raise CheckpointError(f"{name}: {key} is stored as {dtype}; an alpha is one of {', '.join(_NUMBERS)}")
            opened.seek(start + begin)
            values = np.frombuffer(opened.read(end - begin), _NUMBERS[dtype])
            if values.size != 1:
                raise CheckpointError(f"{name}: {key} holds {values.size} numbers; an alpha is one")
            found[key] = float((values.astype(np.uint32) << 16).view(np.float32)[0] if dtype == "BF16" else values[0])
    return found
