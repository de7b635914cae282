"""The codec's part in early looks: the last one of each block, of its real frames, and the map for the others where a model
brings none."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dualparal.events import Look
from dualparal.media.rough import pack, shrink
from dualparal.messages import RunJob
from dualparal.model.latent_rgb import find_map, store_map
from dualparal.model.latent_rgb_fit import fit_own_map
from dualparal.model.layout import Checkpoint
from dualparal.model.vae import StreamingDecoder
from dualparal.ring.worker import working_at

log = logging.getLogger(__name__)


def finished_look(job: RunJob, block: int, frames: np.ndarray) -> Look:
    """A block as it is in the video: `frames` [F, H, W, 3] uint8."""
    pictures, steps = shrink(frames), job.request.num_inference_steps
    return Look(job_id=job.job_id, block=block, step=steps, num_steps=steps, num_pictures=len(pictures), picture=pack(pictures))


class MapFitting:
    """Fits the map of a checkpoint that has none, once, and keeps it where rank 0 finds it."""

    def __init__(self, checkpoint: Checkpoint, cache: Path) -> None:
        self._checkpoint, self._cache = checkpoint, cache

    def fit(self, decoder: StreamingDecoder) -> None:
        """Do it if need be; `decoder` must have nothing of a video yet. A VAE that it does not work with makes no looks."""
        try:
            if find_map(self._checkpoint, self._cache) is not None:
                return
            found = fit_own_map(decoder.vae, lambda: working_at("fitting the map of early looks"))
            store_map(found, self._checkpoint, self._cache)
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("there are no early looks of this model: %s", error)
        finally:
            decoder.begin()
            working_at(None)
