"""What a film begins with, on rank 0, as latents from the job's folder: the end of the film that it continues, or a picture or
the end of a video file, which are encoded once and kept.

Rank 0 alone knows of it: block 0 sees it as a `Ghost`. A picture's latent frame is decoded before that block's and shown; a
film's end is decoded too, but not shown (METHOD.md, "Continuing").
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
from dualparal.files import CLIP, END_LATENTS, START_CLIP, START_IMAGE, START_LATENTS, STATE_FOLDER, checksum_of
from dualparal.messages import RunJob
from dualparal.ring.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
KEPT = "ghost.safetensors"


def start_latents(
    job: RunJob, encode: Callable[[np.ndarray], torch.Tensor], encode_clip: Callable[[Path], torch.Tensor]
) -> torch.Tensor | None:
    """Latents [1, C, F, h, w] float32 of what the job's film begins with; None where that is nothing. `encode` makes the one of
    a picture, uint8 [H, W, 3], `encode_clip` those of a clip in a file. Raises `OutputError` when it is gone or is another."""
    if (film := job.request.continue_from) is not None and not film.startswith(CLIP):
        file = Path(job.folder) / START_LATENTS
        try:
            return read_tensors(file, written_as=Path(END_LATENTS).name, written_for=film)[0]["latents"]
        except (OutputError, KeyError) as error:
            raise OutputError(f"the end of the film to be continued is lost: {error}; submit the job again") from None
    if film is None and job.request.start_image is None:
        return None
    kept = Path(job.folder) / STATE_FOLDER / KEPT
    if job.is_resumed:
        try:
            return read_tensors(kept)[0]["latents"]
        except (OutputError, KeyError) as error:
            log.info("what the film begins with is encoded again: %s", error)
    if film is not None:
        clip = Path(job.folder) / START_CLIP
        _check(clip, film.removeprefix(CLIP), "video")
        found = encode_clip(clip)[:, :, -job.request.ghost :].clone()
    else:
        assert job.request.start_image is not None
        found = encode(_read(Path(job.folder) / START_IMAGE, job.request.start_image))
    try:
        kept.parent.mkdir(exist_ok=True)
        write_tensors(kept, {"latents": found}, {})
    except (OSError, SafetensorError) as error:
        log.warning("what the film begins with is not kept encoded: %s", error)
    return found


def _check(file: Path, digest: str, what: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror}; submit the job again") from None
    if checksum_of(data) != digest:
        raise OutputError(f"{file} is not the {what} that the job was given; submit the job again")
    return data


def _read(file: Path, digest: str) -> np.ndarray:
    data = _check(file, digest, "picture")
    return np.array(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
