"""A caller's tensors (noise, embeddings), checked and copied before a job is queued. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dualparal.errors import RequestError
from dualparal.method.rules import plan_of
from dualparal.model.layout import Checkpoint
from dualparal.request import Settings


@dataclass(frozen=True)
class GivenTensors:
    """What a caller gave, as float32 copies."""

    latents: tuple[np.ndarray, ...] | None  # initial noise per block, each [1, C, F, h, w]
    prompt_embeds: np.ndarray | None  # [1, tokens, text dim]
    negative_prompt_embeds: np.ndarray | None

    def __bool__(self) -> bool:
        return any(given is not None for given in (self.latents, self.prompt_embeds, self.negative_prompt_embeds))


def checked_tensors(
    request: Settings, checkpoint: Checkpoint, *, latents: Any, prompt_embeds: Any, negative_prompt_embeds: Any
) -> GivenTensors:
    """The tensors for a resolved `request`, each None where it is left out. Raises `RequestError`."""
    given = GivenTensors(
        _checked_noise(latents, request, checkpoint),
        _checked_text(prompt_embeds, "prompt_embeds", checkpoint),
        _checked_text(negative_prompt_embeds, "negative_prompt_embeds", checkpoint),
    )
    if given.prompt_embeds is not None and request.shots:
        raise RequestError("prompt_embeds are of one text, and the request has shots; leave one of them out", "prompt_embeds")
    if given and request.is_endless:
        raise RequestError("is_endless: the tensors given are those of a film with an end; leave them out", "is_endless")
    return given


def _checked_noise(latents: Any, request: Settings, checkpoint: Checkpoint) -> tuple[np.ndarray, ...] | None:
    if latents is None:
        return None
    if not isinstance(latents, (list, tuple)):
        raise RequestError("latents must be a list with one tensor per block", "latents")
    blocks = tuple(_to_numpy(block, "latents") for block in latents)
    channels, factor = checkpoint.latent_sizes
    size = request.height // factor, request.width // factor
    expected = [(1, channels, length, *size) for length in plan_of(request).lengths]
    if (given := [block.shape for block in blocks]) != expected:
        raise RequestError(f"latents have shapes {_few(given)}; this request needs {_few(expected)}", "latents")
    return blocks


def _checked_text(embeds: Any, name: str, checkpoint: Checkpoint) -> np.ndarray | None:
    if embeds is None:
        return None
    text, text_dim = _to_numpy(embeds, name), checkpoint.text_dim
    if text.ndim != 3 or text.shape[0] != 1 or not text.shape[1] or text.shape[2] != text_dim:
        raise RequestError(f"{name} have shape {list(text.shape)}; they must be [1, tokens, {text_dim}]", name)
    return text


def _to_numpy(tensor: Any, name: str) -> np.ndarray:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float().cpu().numpy()
    if not isinstance(tensor, np.ndarray) or tensor.dtype.kind not in "fiu":
        raise RequestError(f"{name} must be tensors or arrays of numbers, not {type(tensor).__name__}", name)
    array = np.array(tensor, dtype=np.float32, order="C")  # a copy: the caller may change theirs before the job runs
    if not np.isfinite(array).all():
        raise RequestError(f"{name} hold values that are not finite", name)
    return array


def _few(shapes: list[Any]) -> str:
    """A list of shapes as a short piece of a sentence."""
    shown = ", ".join(str(list(shape)) for shape in shapes[:6])
    return f"{shown}, ... ({len(shapes)} in all)" if len(shapes) > 6 else shown or "(none)"
