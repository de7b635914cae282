"""The picture that a film begins with, on rank 0: read from the job's folder, encoded once, and kept there as its latent frame.

Rank 0 alone knows of it: block 0 sees it as a `Ghost`, and its latent frame is decoded before that block's.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dualparal.errors import OutputError
from dualparal.files import START_IMAGE, STATE_FOLDER, checksum_of
from dualparal.messages import RunJob
from dualparal.ring.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
KEPT = "ghost.safetensors"


def start_latents(job: RunJob, encode: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor | None:
    """The latent frame [1, C, 1, h, w] float32 of the job's picture; None where it has none. `encode` makes it of the picture,
    uint8 [H, W, 3]. Raises `OutputError` when the picture is gone or is another."""
    if job.request.start_image is None:
        return None
    kept = Path(job.folder) / STATE_FOLDER / KEPT
    if job.is_resumed:
        try:
            return read_tensors(kept)[0]["latents"]
        except (OutputError, KeyError) as error:
            log.info("the picture is encoded again: %s", error)
    found = encode(_read(Path(job.folder) / START_IMAGE, job.request.start_image))
    try:
        kept.parent.mkdir(exist_ok=True)
        write_tensors(kept, {"latents": found}, {})
    except (OSError, SafetensorError) as error:
        log.warning("the encoded picture is not kept: %s", error)
    return found


def _read(file: Path, digest: str) -> np.ndarray:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror}; submit the job again") from None
    if checksum_of(data) != digest:
        raise OutputError(f"{file} is not the picture that the job was given; submit the job again")
    return np.array(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
