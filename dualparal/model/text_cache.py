"""Text embeddings kept on disk across runs: a prompt that was encoded before costs neither the encoder nor its loading.

One safetensors file per (text encoder, dtype, kind of device, prompt), written under a temporary name and renamed, so that
several programs may share the folder. The oldest used ones go when the folder grows beyond its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dualparal.files import checksum_of, remove_partials, written_atomically

MAX_BYTES = 10**9  # about 2000 prompts of a hundred tokens
PARTIAL_LASTS_S = 3600.0


class EmbeddingCache:
    """A folder of embeddings, each [1, tokens, text dim] without padding. Never raises: a cache that fails is a miss."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def load(self, key: str) -> torch.Tensor | None:
        """What was stored under `key`, or None."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as opened:
                found, checksum = opened.get_tensor("embeddings").clone(), (opened.metadata() or {}).get("checksum")
        except (OSError, SafetensorError, RuntimeError):  # the last is torch's, where it cannot map the file
            return None
        if checksum != _checksum(key, found):  # of an older version, or other bits than were stored
            return None
        with contextlib.suppress(OSError):  # a folder that can only be read serves as well
            os.utime(path)  # used now
        return found

    def store(self, key: str, embeddings: torch.Tensor) -> None:
        """Keep `embeddings`; the least recently used ones make room."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_atomically(path, is_durable=False, is_shared=True) as partial:
                kept = embeddings.contiguous()
                partial.write_bytes(save({"embeddings": kept}, {"checksum": _checksum(key, kept)}))
            self._make_room()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        remove_partials(self._folder, min_age_s=PARTIAL_LASTS_S)
        files = sorted(((file.stat(), file) for file in self._folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime)
        surplus = sum(stat.st_size for stat, _ in files) - self._max_bytes
        for stat, file in files[:-1]:
            if surplus <= 0:
                return
            file.unlink(missing_ok=True)
            surplus -= stat.st_size


def _checksum(key: str, embeddings: torch.Tensor) -> str:
    about = f"{key} {embeddings.dtype} {list(embeddings.shape)} ".encode()
    return checksum_of(about + embeddings.reshape(-1).view(torch.uint8).numpy().tobytes())


def cache_key(*parts: str) -> str:
    """One file name for all that an embedding depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
