"""Measured speeds of this host's devices, kept as one small JSON file: `plan --calibrate` writes it, plans read it.

`DUALPARAL_CACHE` names another folder than `~/.cache/dualparal` (XDG_CACHE_HOME is respected). Needs no torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dualparal.errors import OutputError
from dualparal.files import write_atomically
from dualparal.paths import expand, home_cache
from dualparal.planning.placement import Speed


def cache_folder() -> Path:
    """Where things are kept that can be made anew: DUALPARAL_CACHE, else the user's cache folder."""
    named = os.environ.get("DUALPARAL_CACHE")
    if named:
        return expand(named)
    return home_cache() / "dualparal"


def load_speed(device: str, dtype: str, dim: int) -> Speed | None:
    """The speed measured for a model of this width on this kind of device ("cpu" or "cuda"), None before a calibration."""
    entry = _read().get(_key(device, dtype, dim))
    if not isinstance(entry, dict):
        return None
    try:
        # What an older version did not measure, or this one did not, is left to its default.
        return Speed(**{field.name: float(entry[field.name]) for field in fields(Speed) if entry.get(field.name) is not None})
    except (TypeError, ValueError):
        return None


def store_speed(device: str, dtype: str, dim: int, speed: Speed) -> Path:
    """Keep a measured speed beside the others; returns the file. Raises `OutputError`."""
    path = cache_folder() / "calibration.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**_read(), _key(device, dtype, dim): asdict(speed)}, indent=1))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; name another folder with DUALPARAL_CACHE") from None
    return path


def _key(device: str, dtype: str, dim: int) -> str:
    return f"{device.partition(':')[0]} {dtype} dim {dim}"


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / "calibration.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
