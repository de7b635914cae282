"""A job's announcement to the other ranks as bytes that cannot run code: JSON for what is said, safetensors for tensors.

Only the dataclasses named here can be made of it. Whoever can write into a worker's connections could do so with a pickle.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from safetensors.torch import load, save

from dualparal.messages import JobSpec
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules
from dualparal.method.step_cache import StepCache
from dualparal.model.lora_source import Lora
from dualparal.model.stage import Conditions, JobShape

KINDS: dict[str, type] = {kind.__name__: kind for kind in (JobSpec, Rules, BlockPlan, StepCache, JobShape, Conditions, Lora)}
KEY = "announcement"


def encode(message: Any) -> bytes:
    """A dataclass of `KINDS`, tuples, lists, tensors, plain values or None. Raises TypeError for anything else."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(message, tensors), allow_nan=False)
    return bytes(save({"": torch.zeros(1), **tensors}, {KEY: text}))  # a file of no tensors cannot be read


def decode(data: bytes) -> Any:
    """The inverse of `encode`, all tensors on the CPU. Raises ValueError for anything else."""
    length = int.from_bytes(data[:8], "little")
    tensors = load(data)
    text = json.loads(data[8 : 8 + length])["__metadata__"][KEY]
    return _made(json.loads(text), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if dataclasses.is_dataclass(value) and type(value).__name__ in KINDS:
        fields = {field.name: _plain(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_plain(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be announced; tell dualparal.ring.announcement of it")


def _made(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match value:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"kind": str(name), "fields": dict(fields)} if name in KINDS:
            return KINDS[name](**{key: _made(item, tensors) for key, item in fields.items()})
        case {"tuple": list(items)}:
            return tuple(_made(item, tensors) for item in items)
        case {"list": list(items)}:
            return [_made(item, tensors) for item in items]
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"an announcement has something that no announcement has: {str(value)[:60]}")
