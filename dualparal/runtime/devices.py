"""Which devices an engine uses, found without torch: the front end never imports it."""

from __future__ import annotations

import os
from pathlib import Path

from dualparal.errors import RequestError


def count_gpus() -> int:
    """CUDA devices visible to this process: CUDA_VISIBLE_DEVICES if set, else what the driver lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def place(device: str, ranks: int) -> tuple[tuple[str, ...], str]:
    """(device of each rank, device of the codec) for `device` "auto", "cpu" or "cuda".

    On GPUs rank r takes card r, and the codec a spare card or else the last rank's. Raises `RequestError` when there are
    fewer cards than ranks (NCCL refuses two ranks on one card).
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device={device!r} is not known; use auto, cpu or cuda", "device")
    num_gpus = count_gpus()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return ("cpu",) * ranks, "cpu"
    if num_gpus < ranks:
        raise RequestError(f"ranks={ranks} needs {ranks} GPUs, {num_gpus} are visible; use fewer ranks or device cpu", "ranks")
    return tuple(f"cuda:{rank}" for rank in range(ranks)), f"cuda:{min(ranks, num_gpus - 1)}"
