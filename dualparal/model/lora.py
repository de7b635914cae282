"""LoRA: the change each file makes to the weights of one stage, merged while they are loaded.

W becomes W + scale * alpha / rank * B @ A in float32 before it is cast. What a file's keys mean is `lora_file`'s business;
of the file itself only what belongs to this stage's weights is ever read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualparal.errors import CheckpointError
from dualparal.model.headers import TensorInfo
from dualparal.model.lora_file import check_changes, read_lora
from dualparal.model.lora_source import Lora
from dualparal.model.weights import read_tensors


class LoraMerge:
    """The changes that `loras` make to one expert's weights; `apply` them to one tensor after another."""

    def __init__(self, loras: Sequence[Lora], expert: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """`shapes`: every tensor of the whole transformer. Raises `CheckpointError` for a LoRA of another model."""
        files = [(lora, read_lora(lora.file, lora.name)) for lora in loras]
        self._used = [(lora, file, part) for lora, file in files if (part := file.for_expert(lora, expert))]
        for lora, file, component in self._used:
            check_changes(lora.name, file.modules[component], shapes)

    def apply(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """`value` of the parameter `key` with every LoRA merged, float32; `value` itself when none touches it.

        Raises `CheckpointError` when a LoRA's weights are not numbers.
        """
        module, _, end = key.rpartition(".")
        for lora, file, component in self._used:
            parts = file.modules[component].get(module, {})
            if not parts:
                continue
            for_weight, for_bias = (lora.scale * factor for factor in file.factors[component][module])
            if end == "weight" and "down" in parts:
                down, up = _read(lora, (parts["down"], parts["up"]))
                value = value.float() + ((up.flatten(1) @ down.flatten(1)) * for_weight).view_as(value)
            elif end == "weight" and "diff" in parts:
                (diff,) = _read(lora, (parts["diff"],))
                value = value.float() + (diff * for_weight).view_as(value)
            elif end == "bias" and "bias" in parts:
                (bias,) = _read(lora, (parts["bias"],))
                value = value.float() + bias * for_bias
        return value


def _read(lora: Lora, sources: Sequence[TensorInfo]) -> list[torch.Tensor]:
    """The tensors of `sources`, float32."""
    found = dict(read_tensors({source.key: source for source in sources}))
    for key, value in found.items():
        if not torch.isfinite(value.float()).all():
            raise CheckpointError(f"{lora.name}: {key} holds NaN or infinite numbers; download it again")
    return [found[source.key].float() for source in sources]
