"""Text embeddings kept on disk across runs: a prompt that was encoded before costs neither the encoder nor its loading.

One safetensors file per (text encoder, dtype, kind of device, prompt), written under a temporary name and renamed, so that
several programs may share the folder. The oldest used ones go when the folder grows beyond its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

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
            found = load_file(path)["embeddings"]
        except (OSError, SafetensorError, KeyError):
            return None
        with contextlib.suppress(OSError):  # a folder that can only be read serves as well
            os.utime(path)  # used now
        return found

    def store(self, key: str, embeddings: torch.Tensor) -> None:
        """Keep `embeddings`; the least recently used ones make room."""
        path = self._path(key)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(save({"embeddings": embeddings.contiguous()}))
            os.replace(partial, path)
            self._make_room()
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        for left in self._folder.glob(".*.part"):  # of a process that was killed
            if left.stat().st_mtime < time.time() - PARTIAL_LASTS_S:
                left.unlink(missing_ok=True)
        files = sorted(((file.stat(), file) for file in self._folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime)
        surplus = sum(stat.st_size for stat, _ in files) - self._max_bytes
        for stat, file in files[:-1]:
            if surplus <= 0:
                return
            file.unlink(missing_ok=True)
            surplus -= stat.st_size


def fingerprint(*folders: Path) -> str:
    """Changes when a file in `folders` does: names, sizes and times, and in the hub's cache the content's own hash."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for file in folder.iterdir() if file.is_file()):
            stat, target = file.stat(), file.resolve()
            is_blob = target.parent.name == "blobs"
            told = target.name if is_blob else f"{target} {stat.st_size} {stat.st_mtime_ns}"
            digest.update(f"{folder.name}/{file.name} {told}\n".encode())
    return digest.hexdigest()


def cache_key(*parts: str) -> str:
    """One file name for all that an embedding depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
