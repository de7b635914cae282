"""LoRAs of one job: their changes run beside a stage's weights, which stay as they are.

What a module gives out becomes W x + b + up (down x) with scale and alpha in `up`, so that a job without them computes what a
fresh stage computes, and the next job's need no weight to be loaded. Merged while loading (`model.lora`) the same LoRA is the
same change but for rounding. What was read of a file is kept in host memory, the least recently used goes first.

Shapes: r rank, summed over a module's LoRAs; i inputs, o outputs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo
from dualparal.model.lora_file import read_lora
from dualparal.model.lora_source import Lora
from dualparal.model.weights import read_tensors

Parts = dict[str, torch.Tensor]  # of one module: down [r, i], up [o, r], diff [o, i], bias [o], as they are stored


@dataclass
class Change:
    """What is added to one module's output, on its device and in its dtype."""

    down: torch.Tensor | None = None  # [r, i]
    up: torch.Tensor | None = None  # [o, r]
    whole: torch.Tensor | None = None  # of the weight's shape
    bias: torch.Tensor | None = None  # [o]

    @torch.inference_mode()
    def add(self, module: nn.Module, given: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """`out`, which `module` made of `given`, changed in place."""
        x = given[0]
        if self.down is not None and self.up is not None:
            inner = nn.functional.linear(x.to(self.down.dtype), self.down).flatten(0, -2)  # [n, r]
            out.view(-1, out.shape[-1]).addmm_(inner, self.up.T)
        if self.whole is not None and isinstance(module, nn.Conv3d):
            out += nn.functional.conv3d(x.to(self.whole.dtype), self.whole, None, module.stride, module.padding)
        elif self.whole is not None:
            out += nn.functional.linear(x.to(self.whole.dtype), self.whole)
        if self.bias is not None:
            out += self.bias if isinstance(module, nn.Linear) else self.bias.view(-1, *(1,) * (out.ndim - 2))
        return out


class LoraCache:
    """What was read of LoRA files, for one stage, at most `max_bytes` of host memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Parts]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(_bytes(found) for found in self._kept.values())

    def read(self, lora: Lora, component: str, owned: Callable[[str], bool]) -> dict[str, Parts]:
        """The parts of each module of `component` that is `owned`, as any other that is asked for has to be. Raises
        `CheckpointError`."""
        key = (*identity(lora), component)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        modules = read_lora(lora.file, lora.name).modules[component]
        wanted = {f"{name}:{part}": info for name, parts in modules.items() if owned(name) for part, info in parts.items()}
        found: dict[str, Parts] = {}
        for place, value in _read(lora, wanted).items():
            name, _, part = place.rpartition(":")
            found.setdefault(name, {})[part] = value
        self._kept[key] = found
        while self._kept and self.num_bytes > self.max_bytes:
            self._kept.popitem(last=False)
        return found


def identity(lora: Lora) -> tuple[Any, ...]:
    """What tells a file from one that has taken its place. Raises `CheckpointError`."""
    try:
        stat = os.stat(lora.file)  # as `read_lora` does
    except OSError as error:
        raise CheckpointError(f"LoRA {lora.name} cannot be read: {error.strerror}; put it back or leave it out") from None
    return lora.file, stat.st_size, stat.st_mtime_ns, stat.st_ino


def _read(lora: Lora, wanted: dict[str, TensorInfo]) -> Parts:
    by_key = {info.key: place for place, info in wanted.items()}
    found = {by_key[key]: value for key, value in read_tensors({info.key: info for info in wanted.values()})}
    for place, value in found.items():
        if not torch.isfinite(value.float()).all():
            raise CheckpointError(f"{lora.name}: {wanted[place].key} holds NaN or infinite numbers; download it again")
    return found


def _bytes(found: dict[str, Parts]) -> int:
    return sum(value.numel() * value.element_size() for parts in found.values() for value in parts.values())


class LorasBeside:
    """The LoRAs that run beside the weights of a stage's `models`, one model for each expert."""

    def __init__(
        self, models: Sequence[WanTransformer3DModel], dtype_of: Callable[[str], torch.dtype], device: torch.device,
        max_bytes: int,
    ) -> None:  # fmt: skip
        """`dtype_of(key)`: what the parameter `key` runs in. `max_bytes` of host memory keep what was read."""
        self._modules = [_changeable(model) for model in models]
        self._dtype_of, self._device, self._cache = dtype_of, device, LoraCache(max_bytes)
        self._handles: list[Any] = []
        self._present: tuple[Any, ...] = ()
        self.num_bytes = 0  # on the device

    def use(self, loras: Sequence[Lora]) -> None:
        """Run with these LoRAs, in this order, and no others. Raises `CheckpointError` for a file that cannot be used; then
        there are none."""
        wanted = tuple((lora, identity(lora)) for lora in loras)
        if wanted == self._present:
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._present, self.num_bytes = [], (), 0
        found = [self._changes(expert, loras) for expert in range(len(self._modules))]
        for modules, changes in zip(self._modules, found, strict=True):
            for name, change in changes.items():
                self._handles.append(modules[name].register_forward_hook(change.add))
                held = (change.down, change.up, change.whole, change.bias)
                self.num_bytes += sum(x.numel() * x.element_size() for x in held if x is not None)
        self._present = wanted

    def _changes(self, expert: int, loras: Sequence[Lora]) -> dict[str, Change]:
        modules = self._modules[expert]
        parts: dict[str, list[tuple[Parts, float, float]]] = {}
        for lora in loras:
            file = read_lora(lora.file, lora.name)
            if (component := file.for_expert(lora, expert)) is None:
                continue
            for name, found in self._cache.read(lora, component, modules.__contains__).items():
                for_weight, for_bias = file.factors[component][name]
                parts.setdefault(name, []).append((found, lora.scale * for_weight, lora.scale * for_bias))
        return {name: self._change(name, modules[name], given) for name, given in parts.items()}

    def _change(self, name: str, module: nn.Module, given: list[tuple[Parts, float, float]]) -> Change:
        """The sum of all changes of one module, scales and alphas multiplied in float32."""
        change, dtype = Change(), self._dtype_of(f"{name}.weight")
        pairs = [(p["down"].float().flatten(1), p["up"].float().flatten(1) * by) for p, by, _ in given if "down" in p]
        whole = [p["diff"].float() * by for p, by, _ in given if "diff" in p]
        bias = [p["bias"].float() * by for p, _, by in given if "bias" in p]
        if pairs and isinstance(module, nn.Linear):
            change.down = torch.cat([down for down, _ in pairs]).to(self._device, dtype)
            change.up = torch.cat([up for _, up in pairs], dim=1).to(self._device, dtype)
        else:
            whole += [up @ down for down, up in pairs]
        if whole:
            assert isinstance(module.weight, torch.Tensor)
            change.whole = torch.stack([x.view(module.weight.shape) for x in whole]).sum(dim=0).to(self._device, dtype)
        if bias:
            change.bias = torch.stack(bias).sum(dim=0).to(self._device, dtype)
        return change


def _changeable(model: WanTransformer3DModel) -> dict[str, nn.Module]:
    """The modules of a stage's share that LoRAs change, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))}
