"""An engine's options: checks that need no torch, so that a wrong one is refused before any process starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dualparal.errors import RequestError

if TYPE_CHECKING:
    from dualparal.runtime.messages import WorkerOptions

DTYPE_NAMES = {
    "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
    "fp16": "float16", "half": "float16",
}  # fmt: skip
TEXT_ENCODER_PLACES = ("auto", "keep", "free", "cpu")
QUANTIZATIONS = ("fp8", "int8")
AUTO_SPLIT = "auto"
CHANGES = ("loras", "attention", "compile", "quantization", "vae_dtype")  # options that change a video's numbers


def dtype_name(given: object, default: str, field: str) -> str:
    """The plain name of a dtype (torch's spelling and short names are taken); `default` for None. Raises `RequestError`."""
    name = str(given).removeprefix("torch.") if given else default
    if name not in DTYPE_NAMES:
        raise RequestError(f"{field}={given!r} is not known; use {', '.join(DTYPE_NAMES)}", field)
    return DTYPE_NAMES[name]


def check_text_encoder(place: str) -> str:
    """`place` itself: keep (on its device), free (dropped after encoding), cpu (waits in host memory), auto (keep where it
    fits, `job_plan.settle_text_encoder`)."""
    if place not in TEXT_ENCODER_PLACES:
        raise RequestError(f"text_encoder={place!r} is not known; use {', '.join(TEXT_ENCODER_PLACES)}", "text_encoder")
    return place


def check_quantization(name: str | None) -> str | None:
    """`name` itself: None, fp8, or int8 where torchao is installed. Raises `RequestError`."""
    if name is not None and name not in QUANTIZATIONS:
        raise RequestError(f"quantization={name!r} is not known; use {' or '.join(QUANTIZATIONS)}", "quantization")
    if name == "int8" and importlib.util.find_spec("torchao") is None:
        raise RequestError("quantization=int8 needs the package torchao (pip install torchao); or use fp8", "quantization")
    return name


def check_offload(is_offloaded: bool, *, on_gpu: bool, quantization: str | None, is_compiled: bool) -> bool:
    """`is_offloaded` itself. Raises `RequestError` where layers cannot wait in host memory."""
    if is_offloaded and not on_gpu:
        raise RequestError("offload moves layers between host and GPU; without a GPU leave it out", "offload")
    if is_offloaded and quantization == "int8":
        raise RequestError("offload cannot move int8 weights; use quantization=fp8", "offload")
    if is_offloaded and is_compiled:
        raise RequestError("offload and compile do not go together; leave one of them out", "offload")
    return is_offloaded


def check_offload_cache(is_offloaded: bool, *, on_gpu: bool) -> bool:
    """`is_offloaded` itself. Raises `RequestError` where K and V are in host memory anyway."""
    if is_offloaded and not on_gpu:
        raise RequestError("offload_cache moves K and V between host and GPU; without a GPU leave it out", "offload_cache")
    return is_offloaded


def changes_of(options: WorkerOptions) -> dict[str, Any]:
    """Those of `CHANGES` that differ from the model as it is, as a job's record keeps them."""
    changes: dict[str, Any] = {}
    if options.loras:
        changes["loras"] = [lora.label for lora in options.loras]
    for name, value, plain in (
        ("attention", options.attention, None), ("compile", options.is_compiled, False),
        ("quantization", options.quantization, None), ("vae_dtype", options.vae_dtype, "float32"),
    ):  # fmt: skip
        if value != plain:
            changes[name] = value
    return changes


def layer_counts(given: Sequence[int] | str | None) -> Sequence[int] | str | None:
    """Layers per rank from a flag like "15,15"; counts, None and "auto" (the fastest split) as they are. Raises
    `RequestError`."""
    if given is None or not isinstance(given, str) or given == AUTO_SPLIT:
        return given
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise RequestError(
            f"layer_split={given!r} is not a list of counts; write e.g. 15,15, or auto for the fastest", "layer_split"
        ) from None
