"""The LoRAs that requests may name: those that ship, those in the operator's folder, and for who may read this host's files any
path or hub id. Needs no torch.

A name is what a job's settings keep: of a file in the folder its path within, of any other file its name alone, for where it
lies is nobody's business who gets a video. Where it lay is in the job's record.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualparal.errors import CheckpointError, RequestError
from dualparal.model.hub import at_hand
from dualparal.model.lora_file import check_loras, read_lora
from dualparal.model.lora_source import Lora, find_loras, name_among
from dualparal.paths import is_file

SHIPPED = Path(__file__).resolve().parent.parent / "pocket" / "loras"
MAX_DEPTH = 3  # folders within the operator's


class LoraShelf:
    """LoRAs of requests for a model with `num_experts` experts, whose transformers have tensors of these `shapes`."""

    def __init__(self, folder: Path | None, num_experts: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._folder, self._num_experts, self._shapes = folder, num_experts, dict(shapes)

    def known(self) -> dict[str, Path]:
        """Those with names of their own: of the files that ship what fits this model, and all in the folder, as it is now."""
        found = {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors")) if self._fits(path)}
        if self._folder is not None:
            for path in sorted(_files_in(self._folder)):
                found[path.relative_to(self._folder).as_posix()] = path
        return found

    def offered(self, of_presets: Sequence[str] = ()) -> list[str]:
        """The names that anybody may ask for: the known ones, and those of `of_presets`, which a server has chosen itself."""
        known = self.known()
        return list(dict.fromkeys([*known, *(_bare(spec, known) for spec in of_presets)]))

    def check_offered(self, specs: Sequence[str], of_presets: Sequence[str] = ()) -> None:
        """Raise `RequestError` for the first of `specs` that is not offered."""
        offered = self.offered(of_presets) if specs else []
        for spec in specs:
            if name_among(spec, offered) is None:
                there = f"; there are {', '.join(offered[:8])}" if offered else "; this server has none"
                raise RequestError(f"loras: {_shown(spec)} is not a LoRA of this server{there}", "loras")

    def is_at_hand(self, specs: Sequence[str]) -> bool:
        """Whether a job with these could begin without a download."""
        here = self._here(specs)
        return all(name_among(spec, here) or is_file(_bare(spec, here)) for spec in specs)

    def _here(self, specs: Sequence[str]) -> dict[str, Path]:
        """`known`, and what of `specs` was downloaded before: the hub is not asked again."""
        found = self.known()
        for name in [_bare(spec, found) for spec in specs]:
            if name not in found and not is_file(name) and (path := at_hand(name)) is not None:
                found[name] = path
        return found

    def find(self, specs: Sequence[str]) -> tuple[Lora, ...]:
        """The files of `specs`, which fit the model; those of hub ids are downloaded. Raises `RequestError`."""
        if not specs:
            return ()
        try:
            found = find_loras(specs, self._num_experts, self._here(specs))
            check_loras(found, self._num_experts, self._shapes)
        except CheckpointError as error:
            raise RequestError(f"loras: {error}", "loras") from None
        return found

    def elements(self, specs: Sequence[str]) -> int | None:
        """Numbers in all that the LoRAs of `specs` hold for all layers and experts; None where a file is not here."""
        if not self.is_at_hand(specs):
            return None
        total = 0
        for lora in self.find(specs):
            file = read_lora(lora.file, lora.name)
            for expert in range(self._num_experts):
                modules = file.modules.get(file.for_expert(lora, expert) or "", {})
                total += sum(_count(info.shape) for parts in modules.values() for info in parts.values())
        return total

    def _fits(self, path: Path) -> bool:
        try:
            check_loras([Lora(path.stem, str(path))], 1, self._shapes)
        except CheckpointError:
            return False
        return True


def spec_of(lora: Lora) -> str:
    """How settings name it: without the folders of this host, and without a scale of 1."""
    name = Path(lora.name).name if os.path.isabs(lora.name) else lora.name
    label = dataclasses.replace(lora, name=name).label
    return label.removesuffix(":1") if lora.scale == 1 else label


def as_record(loras: Sequence[Lora]) -> list[dict[str, Any]]:
    """What a job's record keeps of its LoRAs."""
    return [dataclasses.asdict(lora) for lora in loras]


def from_record(found: Any) -> tuple[Lora, ...]:
    """The LoRAs of a job's record. Raises `RequestError` for what no record has, and for a file that is not there any more."""
    try:
        loras = tuple(Lora(**{**one, "experts": tuple(one["experts"])}) for one in found or ())
    except (TypeError, KeyError, ValueError):
        raise RequestError("the job's record does not say which LoRAs it was made with; submit it anew", "loras") from None
    if gone := [lora.name for lora in loras if not is_file(lora.file)]:
        raise RequestError(f"LoRA {gone[0]} of the job is not there any more; put it back", "loras")
    return loras


def _files_in(folder: Path) -> list[Path]:
    found = [path for depth in range(MAX_DEPTH) for path in folder.glob("*/" * depth + "*.safetensors")]
    hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in found if path.is_file() and path not in hidden]


def _bare(spec: str, known: Mapping[str, Path]) -> str:
    """The name in `spec`, without an expert and a scale."""
    if (name := name_among(spec, known)) is not None:
        return name
    for said in ("high:", "low:"):
        spec = spec.removeprefix(said)
    name, colon, scale = spec.rpartition(":")
    return name if colon and not scale.endswith(".safetensors") and "/" not in scale else spec


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shown(spec: str) -> str:
    return ascii(spec if len(spec) <= 60 else spec[:57] + "...")
