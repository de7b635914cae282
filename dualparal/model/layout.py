"""A Wan checkpoint folder in the hub's layout: what is in it, which rank needs which tensor, and whether it is whole.

Reads JSON and safetensors headers only, never a weight, and needs no torch, so that the front end can refuse a bad folder
before any process starts. Follows the safetensors format: 8 bytes little-endian header length, JSON header, data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dualparal.errors import CheckpointError, RequestError
from dualparal.model.part_shapes import embedding_shape, text_encoder_shapes, vae_shapes

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CLASSES = {
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "scheduler": ("UniPCMultistepScheduler",),
}
# Beyond these a config is damaged: nothing is allocated or counted by it.
CONFIG_LIMITS = {
    "num_layers": 1000, "num_attention_heads": 1000, "attention_head_dim": 10_000, "ffn_dim": 1_000_000, "in_channels": 10_000,
    "text_dim": 1_000_000, "freq_dim": 100_000, "rope_max_seq_len": 10_000_000,
}  # fmt: skip
WEIGHT_NAMES = {"text_encoder": "model"}  # transformers' name; diffusers' is the default below


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` as safetensors spells it (F32, BF16, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with model_index.json, transformer[, transformer_2], vae, text_encoder, tokenizer, scheduler."""

    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return _read_json(self.folder / "model_index.json")

    @property
    def num_experts(self) -> int:
        """2 when the folder lists a `transformer_2`, else 1."""
        return 2 if (self.index.get("transformer_2") or [None])[0] else 1

    @property
    def boundary_ratio(self) -> float | None:
        return self.index.get("boundary_ratio")

    def config(self, component: str) -> dict[str, Any]:
        """The config of a component: config.json, or scheduler_config.json for the scheduler."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return _read_json(self.folder / component / name)

    @property
    def transformers(self) -> tuple[str, ...]:
        return ("transformer", "transformer_2")[: self.num_experts]

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

    def tensors(self, component: str) -> dict[str, TensorInfo]:
        """Every tensor of a component, from the headers of its safetensors file or files. Checks that no file is cut off."""
        stem = WEIGHT_NAMES.get(component, "diffusion_pytorch_model")
        folder = self.folder / component
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return read_header(single)
        if not index.is_file():
            if any(folder.glob("*.bin")):
                raise CheckpointError(f"{folder} holds pickled weights (.bin); only safetensors are read, convert it first")
            raise CheckpointError(f"{folder} has no {single.name} and no {index.name}; the download is incomplete")
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; download it again")
        found: dict[str, TensorInfo] = {}
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        for name in sorted(set(weight_map.values())):
            found |= read_header(folder / name)
        if lost := sorted(set(weight_map) - set(found)):
            raise CheckpointError(f"{index} lists {lost[0]} (and {len(lost) - 1} more) that its files do not hold")
        return found

    def validate(self) -> None:
        """Raise `CheckpointError` for the first thing that would stop a run: file, class, key or byte missing."""
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give a Wan checkpoint in diffusers' layout")
        try:
            self._validate()
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder} has a config that makes no sense ({type(error).__name__}: {str(error)[:99]}); download again"
            ) from None

    def _validate(self) -> None:
        if self.index.get("expand_timesteps"):
            raise CheckpointError(f"{self.folder} is a text-image-to-video model (expand_timesteps); use a T2V checkpoint")
        for component in (*self.transformers, "vae", "text_encoder", "scheduler"):
            name = self._class_of(component)
            if name not in CLASSES[component]:
                raise CheckpointError(
                    f"{self.folder}/{component} is a {name}; a Wan text-to-video checkpoint has a {CLASSES[component][0]} there"
                )
        if not any((self.folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise CheckpointError(f"{self.folder}/tokenizer has neither tokenizer.json nor spiece.model; download it again")
        for component in self.transformers:
            self._validate_transformer(component)
        self._check_tensors("vae", vae_shapes(self.config("vae")) or {})
        text_config = self.config("text_encoder")
        tensors = self._check_tensors("text_encoder", text_encoder_shapes(text_config))
        tables = [tensors[name] for name in ("shared.weight", "encoder.embed_tokens.weight") if name in tensors]
        if not tables:
            raise CheckpointError(f"{self.folder}/text_encoder lacks shared.weight; download it again")
        _check_shape("shared.weight", tables[0], embedding_shape(text_config))

    def _check_tensors(self, component: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        """The tensors of a component; raises `CheckpointError` when one of `shapes` is missing or another."""
        tensors = self.tensors(component)
        if missing := sorted(set(shapes) - set(tensors)):
            raise CheckpointError(
                f"{self.folder}/{component} lacks {missing[0]} (and {len(missing) - 1} more tensors); download it again"
            )
        for key, shape in shapes.items():
            _check_shape(key, tensors[key], shape)
        return tensors

    def _class_of(self, component: str) -> str:
        config = self.config(component)
        if component == "text_encoder":
            return str((config.get("architectures") or self.index.get(component, [None, "?"])[1:])[0])
        return str(config.get("_class_name"))

    def _validate_transformer(self, component: str) -> None:
        config, where = self.config(component), self.folder / component
        if config.get("image_dim") or config.get("added_kv_proj_dim"):
            raise CheckpointError(f"{where} is an image-to-video model (image_dim is set); use a T2V checkpoint")
        for name, most in CONFIG_LIMITS.items():
            if not isinstance(value := config.get(name, 1), int) or isinstance(value, bool) or not 1 <= value <= most:
                raise CheckpointError(
                    f"{where}/config.json says {name}={value!r}, not a number of 1 to {most}; download it again"
                )
        if next(iter(config.get("patch_size", (1, 2, 2)))) != 1:
            raise CheckpointError(f"{where} has patch_size {config['patch_size']}; patches of several frames are not supported")
        if (num_layers := config.get("num_layers", 40)) != self.num_layers:
            raise CheckpointError(f"{where} has {num_layers} layers, the first expert {self.num_layers}")
        shapes = transformer_shapes(config)
        tensors = self._check_tensors(component, shapes)
        if surplus := sorted(key for key in tensors if key.startswith("blocks.") and key not in shapes):
            raise CheckpointError(
                f"{where} holds {surplus[0]} (and {len(surplus) - 1} more tensors) that its config does not know, "
                f"num_layers={num_layers} among it; download it again"
            )
        text_dim, d_model = config.get("text_dim", 4096), self.config("text_encoder").get("d_model")
        if text_dim != d_model:
            raise CheckpointError(
                f"{where} expects text_dim={text_dim}, the text encoder gives {d_model}; they are of two models"
            )
        channels, z_dim = config.get("in_channels", 16), self.config("vae").get("z_dim", 16)
        if not channels == (config.get("out_channels") or channels) == z_dim:
            raise CheckpointError(
                f"{where} takes in_channels={channels} and gives {config.get('out_channels')}, the VAE has {z_dim}; "
                "use a T2V checkpoint"
            )


def _check_shape(key: str, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.file}: {key} has shape {list(tensor.shape)}, the config says {list(shape)}")


def transformer_owners(config: dict[str, Any]) -> dict[str, int]:
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


def transformer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
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
    shapes: dict[str, tuple[int, ...]] = {}
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


def split_layers(num_layers: int, ranks: int, layer_split: Sequence[int] | None = None) -> tuple[range, ...]:
    """The contiguous layers of each rank: as `layer_split` counts them, else as even as can be (earlier ranks take the rest).

    Raises `RequestError` when a rank would be left without a layer or the counts do not add up.
    """
    if layer_split is not None:
        if len(layer_split) != ranks or sum(layer_split) != num_layers or min(layer_split) < 1:
            raise RequestError(
                f"layer_split={','.join(map(str, layer_split))} does not fit: it needs {ranks} counts of at least 1 that add "
                f"up to the model's {num_layers} layers",
                "layer_split",
            )
        counts = list(layer_split)
    else:
        if not 1 <= ranks <= num_layers:
            raise RequestError(f"ranks={ranks} does not fit: the model has {num_layers} layers; use 1 to {num_layers}", "ranks")
        counts = [num_layers // ranks + (rank < num_layers % ranks) for rank in range(ranks)]
    starts = [sum(counts[:rank]) for rank in range(ranks)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors a safetensors file lists; raises `CheckpointError` when it is missing, cut off or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file} is not a whole safetensors file ({size} bytes); download it again")
            header = json.loads(opened.read(length))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in entries.values()), default=0)
        found = {key: TensorInfo(file, value["dtype"], tuple(value["shape"])) for key, value in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; the download is incomplete") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} has a damaged safetensors header; download it again") from None
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is cut off: {size} bytes of {8 + length + end}; download it again")
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; is this a Wan checkpoint in diffusers' layout?"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; download it again")
    return found
