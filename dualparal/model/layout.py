"""A Wan checkpoint folder in the hub's layout: its configs, sizes and tensors.

Reads JSON and safetensors headers only, never a weight, and needs no torch, so that the front end can refuse a bad folder
before any process starts. What belongs into the folder is `parts`' business, whether it is there `validation`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dualparal.model.headers import TensorInfo, read_headers, read_json
from dualparal.model.parts import INDEX, PARTS, TRANSFORMERS
from dualparal.model.scales import BLOCK, pair_scales


@dataclass(frozen=True)
class Checkpoint:
    """A folder with model_index.json and a folder for each of `PARTS`; `transformer_2` is there for two experts only."""

    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / INDEX)

    @property
    def num_experts(self) -> int:
        """2 when the folder lists a `transformer_2`, else 1."""
        return 2 if (self.index.get("transformer_2") or [None])[0] else 1

    @property
    def transformers(self) -> tuple[str, ...]:
        return TRANSFORMERS[: self.num_experts]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that this checkpoint has."""
        return tuple(name for name in PARTS if name not in TRANSFORMERS[self.num_experts :])

    @property
    def boundary_ratio(self) -> float | None:
        return self.index.get("boundary_ratio")

    @property
    def flow_shift(self) -> float | None:
        """The shift of the noise schedule that the checkpoint asks for itself, None when it does not."""
        return self.config("scheduler").get("flow_shift")

    @property
    def has_token_times(self) -> bool:
        """Whether each token has a timestep of its own, so that a picture may be clean beside noise (Wan2.2-TI2V)."""
        return bool(self.index.get("expand_timesteps"))

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part that has one."""
        name = PARTS[part].config
        assert name is not None, f"{part} has no config"
        return read_json(self.folder / part / name)

    @property
    def num_layers(self) -> int:
        return int(self.config("transformer").get("num_layers", 40))

    @property
    def text_dim(self) -> int:
        return int(self.config("transformer").get("text_dim", 4096))

    @property
    def latent_sizes(self) -> tuple[int, int]:
        """(channels of the latents, pixels per latent pixel)."""
        return int(self.config("transformer").get("in_channels", 16)), int(self.config("vae").get("scale_factor_spatial") or 8)

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        """Every tensor of a part, each under one name and with its scale, from the headers of its files. Raises
        `CheckpointError` for a file that is cut off and a scale that fits no weight."""
        stem, aliases = PARTS[part].weights, PARTS[part].aliases
        assert stem is not None, f"{part} has no weights"
        block = (self.config(part).get("quantization_config") or {}).get("weight_block_size") or BLOCK
        found = pair_scales(read_headers(self.folder / part, stem), block)
        for name, real in aliases.items():
            if name in found:
                found.setdefault(real, found.pop(name))
        return found
