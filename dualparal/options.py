"""`EngineOptions`: how an engine runs, as `GenerationRequest` is what a video is. Every option is said here and nowhere else.

What belongs to an option stands beside its field: unit and meaning (help of its flag), other names of the flag, whether it
changes a video's numbers. It travels whole: to the workers, into the job's record, to `resume` and `plan`. Checks need no
torch, so that a wrong option is refused before any process starts.
"""

from __future__ import annotations

import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dualparal.errors import RequestError
from dualparal.paths import expand, is_folder, why_missing
from dualparal.request import nearest, shown

DTYPE_NAMES = {
    "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
    "fp16": "float16", "half": "float16",
}  # fmt: skip
AUTO_SPLIT = "auto"
_COUNTED = {"ranks": "processes", "replicas": "worker groups", "threads": "threads", "max_queue": "jobs"}

TextEncoderPlace = Literal["auto", "keep", "free", "cpu"]
Quantization = Literal["fp8", "int8"]


def option(default: Any, description: str, **beside: Any) -> Any:
    """A field of `EngineOptions`. Beside it may stand: `plain`, the value that leaves the numbers as the model has them (the
    field then changes a video); `flags`, other names of its flag; `metavar`; `unit`, how many of the field's units one of the
    flag's is; `of`: "job" (in its record), "host" (each host's own), "server" (of who serves), "inside" (has no flag)."""
    return Field(default, description=description, validate_default=False, json_schema_extra={"of": "job", **beside})


class EngineOptions(BaseModel):
    """How an engine runs. None is settled by the engine from the preset and the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ranks: int = option(1, "processes (GPUs) that share the model's layers", metavar="N")
    replicas: int = option(1, "independent groups of ranks behind one queue", metavar="N", of="server")
    guidance_parallel: int = option(
        1, "2: the guidance halves of a block step side by side, each on half of the ranks (bits do not depend on it)",
        metavar="1|2",
    )  # fmt: skip
    layer_split: tuple[int, ...] | Literal["auto"] | None = option(
        None, "layers per stage: the fastest, or these; even if left out (bits do not depend on it)", metavar="auto|N,N,..."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the ranks run")
    dtype: str | None = option(
        None, "dtype of the DiT: fp32, fp16, bf16 or torch's names (left out: the preset's on GPUs, float32 on the CPU)"
    )
    vae_dtype: str | None = option(None, "dtype of the VAE (left out: the preset's)", plain="float32")
    threads: int | None = option(
        None, "CPU threads per process (left out: the cores shared out but for one; equal bits need equal threads)",
        metavar="N",
    )  # fmt: skip
    attention: str | None = option(None, "attention backend of diffusers: native, flash, sage, ...", metavar="NAME", plain=None)
    compile: bool = option(False, "run layers through torch.compile", plain=False)
    quantization: Quantization | None = option(
        None, "8-bit weights of the layers (changes the numbers; int8 needs torchao)", plain=None
    )
    offload: bool = option(False, "layers wait in host memory and come to the GPU one by one")
    offload_cache: bool = option(False, "with --context cached, neighbours' K and V wait in host memory (GPUs only)")
    text_encoder: TextEncoderPlace = option(
        "auto", "where it is after encoding: kept on its device, freed, or in host memory; auto keeps it where it fits",
        is_of_host=True,
    )  # fmt: skip
    loras: tuple[str, ...] = option(
        (), "file, folder or hub id of a LoRA, for one expert if that is said; repeatable", flags=["lora"],
        metavar="[high:|low:]PATH[:SCALE]", plain=(), is_of_host=True,
    )  # fmt: skip
    lora_folder: Path | None = option(
        None, "folder of LoRAs (safetensors) that requests may name; over HTTP only these and the preset's own",
        metavar="FOLDER", of="host",
    )  # fmt: skip
    lora_cache_bytes: int = option(
        2 * 10**9, "host memory of each rank for LoRAs of requests that were used of late", metavar="GB",
        flags=["lora_cache_gb"], unit=10**9, of="host",
    )  # fmt: skip
    timeout_s: float = option(
        600.0, "seconds to wait for another rank within a job, and that one block step, prompt or latent frame may take",
        of="inside",
    )  # fmt: skip
    worker_hook: str | None = option(None, "module:function called in every worker before it serves (tests)", of="inside")
    outputs: Path | None = option(
        None, "where jobs are kept (left out: DUALPARAL_OUTPUTS or ./outputs)", metavar="FOLDER", of="host"
    )
    max_queue: int = option(32, "most jobs that may wait", metavar="N", of="server")
    max_per_owner: int | None = option(
        None, "most jobs of one visitor at a time; 0 or none: no such limit", metavar="N", of="server"
    )
    max_disk_bytes: int | None = option(
        None, "delete the oldest videos above this", metavar="GB", flags=["max_disk_gb"], unit=10**9, of="server"
    )
    auto_resume: bool = option(False, "a job whose worker died goes on by itself, once", of="inside")
    verbose: bool = option(False, "log what every process does", of="host")
    log_json: bool = option(False, "log one JSON object a line, with worker and job id", of="host")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_sentence(error) from None

    @field_validator(*_COUNTED, mode="before")
    @classmethod
    def _count(cls, number: Any, info: ValidationInfo) -> Any:
        if number is None and info.field_name == "threads":
            return None
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            what = f"{info.field_name}={shown(number)} is not a number of {_COUNTED[str(info.field_name)]}; use 1 or more"
            raise RequestError(what, info.field_name)
        return number

    @field_validator("guidance_parallel", mode="before")
    @classmethod
    def _one_or_two(cls, given: Any) -> int:
        if isinstance(given, bool) or given not in (1, 2):
            raise RequestError(f"guidance_parallel={shown(given)} is not known; use 1 or 2", "guidance_parallel")
        return int(given)

    @field_validator("dtype", "vae_dtype", mode="before")
    @classmethod
    def _dtype(cls, given: Any, info: ValidationInfo) -> str | None:
        return dtype_name(given, str(info.field_name)) if given else None

    @field_validator("quantization")
    @classmethod
    def _is_there(cls, name: str | None) -> str | None:
        if name == "int8" and importlib.util.find_spec("torchao") is None:
            raise RequestError("quantization=int8 needs the package torchao (pip install torchao); or use fp8", "quantization")
        return name

    @field_validator("layer_split", mode="before")
    @classmethod
    def _counts(cls, given: Any) -> Any:
        if given == AUTO_SPLIT or given is None:
            return given
        try:
            return tuple(int(part) for part in given.split(",")) if isinstance(given, str) else tuple(given)
        except (ValueError, TypeError):
            raise RequestError(
                f"layer_split={shown(given)} is not a list of counts; write e.g. 15,15, or auto for the fastest", "layer_split"
            ) from None

    @field_validator("loras", mode="before")
    @classmethod
    def _are_many(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise RequestError(f"loras={shown(given)} is one text; give a list of them", "loras")
        return tuple(str(one) for one in given)

    @field_validator("lora_folder")
    @classmethod
    def _is_a_folder(cls, folder: Path | None) -> Path | None:
        if folder is not None and not is_folder(folder := expand(folder)):
            raise RequestError(
                f"lora_folder: there is no folder {folder}{why_missing(folder)}; make it or name another", "lora_folder"
            )
        return folder

    @field_validator("max_per_owner", "max_disk_bytes", "lora_cache_bytes", mode="before")
    @classmethod
    def _limit(cls, given: Any, info: ValidationInfo) -> Any:
        try:
            number = None if given is None or given == "none" else int(given)
        except (ValueError, TypeError, OverflowError):  # nan and infinity too
            number = -1
        if number is not None and number < 0:
            raise RequestError(f"{info.field_name}={shown(given)} is not a limit; use 0 or more", info.field_name)
        if info.field_name == "lora_cache_bytes":
            return number or 0
        return (number or None) if info.field_name == "max_per_owner" else number

    @model_validator(mode="after")
    def _go_together(self) -> EngineOptions:
        if self.offload and self.quantization == "int8":
            raise RequestError("offload cannot move int8 weights; use quantization=fp8", "offload")
        if self.offload and self.compile:
            raise RequestError("offload and compile do not go together; leave one of them out", "offload")
        return self

    def check_places(self, *, on_gpu: bool) -> None:
        """Raise `RequestError` where something is to wait in host memory that is there anyway."""
        if self.offload and not on_gpu:
            raise RequestError("offload moves layers between host and GPU; without a GPU leave it out", "offload")
        if self.offload_cache and not on_gpu:
            raise RequestError("offload_cache moves K and V between host and GPU; without a GPU leave it out", "offload_cache")

    def settled(self, **values: Any) -> EngineOptions:
        """The same options with `values` in place of what was left open."""
        return self.model_copy(update=values)

    def record(self) -> dict[str, Any]:
        """The settled options as a job's record keeps them: all of a job, those that change numbers where they do."""
        values = self.model_dump(mode="json", include=set(of("job")))
        return {name: value for name, value in values.items() if name not in CHANGES or name in self.changes()}

    def changes(self) -> dict[str, Any]:
        """Those that make other numbers than the model as it is."""
        values = self.model_dump(mode="json", include=set(CHANGES))
        return {name: value for name, value in values.items() if getattr(self, name) != beside(name)["plain"]}


def beside(name: str) -> dict[str, Any]:
    """What stands beside a field (see `option`)."""
    return typing.cast(dict[str, Any], EngineOptions.model_fields[name].json_schema_extra)


def of(*whose: str) -> list[str]:
    """The options of a job, of each host, of who serves."""
    return [name for name in EngineOptions.model_fields if beside(name)["of"] in whose]


CHANGES = tuple(name for name in EngineOptions.model_fields if "plain" in beside(name))
# What the hosts of one pipeline have in common (the split is compared by its layers, dtypes as they were settled).
SAME_ON_HOSTS = [name for name in of("job", "inside") if not beside(name).get("is_of_host") and name != "layer_split"]


def recorded(record: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with what a job's record says of the options that are not given: how the job goes on as it began."""
    found = {name: record[name] for name in of("job") if record.get(name) is not None}
    if "ranks" in given:
        found.pop("guidance_parallel", None)
    if "ranks" in given or "guidance_parallel" in given:
        found.pop("layer_split", None)
    return {**found, **given}


def dtype_name(given: object, field: str) -> str:
    """The plain name of a dtype (torch's spelling and short names are taken). Raises `RequestError`."""
    name = str(given).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise RequestError(f"{field}={shown(given)} is not known; use {', '.join(DTYPE_NAMES)}", field)
    return DTYPE_NAMES[name]


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, alone or beside None; () for any other type."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    return choices_of(parts[0]) if len(parts) == 1 and typing.get_origin(annotation) is not tuple else ()


def _one_sentence(error: ValidationError) -> RequestError:
    first = error.errors()[0]
    if isinstance(ours := first.get("ctx", {}).get("error"), RequestError):
        return ours
    field = str(first["loc"][0]) if first["loc"] else "options"
    if first["type"] == "extra_forbidden":
        near = nearest(field, list(EngineOptions.model_fields))
        return RequestError(f"{shown(field)} is not an option of an engine; did you mean {near}?", field)
    info = EngineOptions.model_fields[field]
    if choices := choices_of(info.annotation):
        return RequestError(
            f"{field}={shown(first['input'])} is not known; use {(' or ' if len(choices) == 2 else ', ').join(choices)}", field
        )
    return RequestError(f"{field}={shown(first['input'])}: {first['msg'].removeprefix('Input ')} ({info.description})", field)
