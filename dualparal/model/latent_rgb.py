"""From latents to small pictures without a VAE: a linear map of each latent pixel to RGB (METHOD.md, "The early look").

The maps are data: the published one of Wan2.1's VAE lies beside this file, a checkpoint may bring its own (as the pocket model
does), and what was fitted on this host lies in its cache. Nothing here knows of steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualparal.files import write_atomically
from dualparal.model.fingerprint import fingerprint
from dualparal.model.layout import Checkpoint

OF_WAN = Path(__file__).with_name("latent_rgb_wan2.1.json")
CACHE = "latent_rgb"  # folder in the cache
FILE = "latent_rgb.json"  # in a checkpoint's folder


@dataclass(frozen=True)
class LatentRgb:
    """Each latent pixel becomes `patch` x `patch` pixels, linearly.

    `weights` [z, patch * patch * 3] and `bias` [patch * patch * 3], rows, columns and colours in this order, give what the
    VAE's decoder gives: colours in -1..1.
    """

    patch: int
    weights: torch.Tensor
    bias: torch.Tensor

    def paint(self, latents: torch.Tensor) -> torch.Tensor:
        """One picture per latent frame: [1, z, F, h, w] normalised to [F, h * patch, w * patch, 3] uint8, where they lie."""
        flat = torch.einsum("zfhw,zk->fhwk", latents[0].float(), self.weights.to(latents.device)) + self.bias.to(latents.device)
        frames, height, width, _ = flat.shape
        cells = flat.view(frames, height, width, self.patch, self.patch, 3).transpose(2, 3)
        pixels = ((cells / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.reshape(frames, height * self.patch, width * self.patch, 3)

    def to_json(self) -> dict[str, Any]:
        rows = [[round(value, 4) for value in row] for row in self.weights.tolist()]
        return {"patch": self.patch, "weights": rows, "bias": [round(value, 4) for value in self.bias.tolist()]}


def read_map(path: Path, z_dim: int) -> LatentRgb | None:
    """The map in a file; None where there is none, or none of `z_dim` channels."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        patch = int(found["patch"])
        weights = torch.tensor(found["weights"], dtype=torch.float32)
        bias = torch.tensor(found["bias"], dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    size = 3 * patch * patch
    is_usable = patch > 0 and weights.shape == (z_dim, size) and bias.shape == (size,)
    return LatentRgb(patch, weights, bias) if is_usable and weights.isfinite().all() and bias.isfinite().all() else None


def find_map(checkpoint: Checkpoint, cache: Path) -> LatentRgb | None:
    """The checkpoint's own map, that of Wan2.1's VAE if it is that, or the one fitted before (`store_map`)."""
    config = checkpoint.config("vae")
    z_dim = int(config["z_dim"])
    if (own := read_map(checkpoint.folder / FILE, z_dim)) is not None:
        return own
    if list(config.get("latents_mean") or ()) == json.loads(OF_WAN.read_text(encoding="utf-8"))["latents_mean"]:
        return read_map(OF_WAN, z_dim)
    return read_map(_kept(checkpoint, cache), z_dim)


def store_map(found: LatentRgb, checkpoint: Checkpoint, cache: Path) -> None:
    """Keep a fitted map for the next time. Raises OSError."""
    path = _kept(checkpoint, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found.to_json()))


def _kept(checkpoint: Checkpoint, cache: Path) -> Path:
    """Raises OSError."""
    return cache / f"{fingerprint(checkpoint.folder / 'vae')}.json"
