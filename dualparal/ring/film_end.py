"""The end of a film as latents, collected while it is decoded and kept in the job's folder, so that another job may go on from
it without a way through pixels (METHOD.md, "Continuing")."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError

from dualparal.files import END_LATENTS
from dualparal.method.plan import KEPT_LATENTS
from dualparal.ring.tensor_files import write_tensors

log = logging.getLogger(__name__)


class FilmEnd:
    """The last latents of the scene that is being decoded."""

    def __init__(self, before: torch.Tensor | None, num_cat: int) -> None:
        """`before` are those of a film that this one continues; `num_cat` is its own."""
        self._latents, self._length = before, max(KEPT_LATENTS, num_cat)

    def begin_scene(self) -> None:
        """What comes is not seen together with what was."""
        self._latents = None

    def add(self, latents: torch.Tensor) -> None:
        """The film goes on with `latents` [1, C, F, h, w]."""
        whole = latents if self._latents is None else torch.cat([self._latents, latents], dim=2)
        self._latents = whole[:, :, -self._length :].clone()

    def keep(self, folder: Path, num_frames: int) -> None:
        """Store it in a job's `folder`, with how many frames were made. Without room for it the film is done all the same."""
        assert self._latents is not None
        file = folder / END_LATENTS
        try:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            write_tensors(file, {"latents": self._latents}, {"num_frames": str(num_frames)})
        except (OSError, SafetensorError) as error:
            log.warning("this film cannot be continued: its end is not kept: %s", error)
