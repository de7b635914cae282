"""Which devices an engine uses, found without torch: the front end never imports it. What CUDA would see says `gpus.py`."""

from __future__ import annotations

import os

from dualparal.errors import RequestError
from dualparal.gpus import visible_gpus
from dualparal.limits import usable_bytes

KEPT_SHARE = 0.03  # of a card's memory
BFLOAT16_SINCE = (8, 0)


def count_gpus() -> int:
    """CUDA devices that this process may use."""
    return len(visible_gpus())


def is_on_gpu(device: str) -> bool:
    """Whether `device` "auto", "cpu" or "cuda" means GPUs on this host."""
    return device != "cpu" and count_gpus() > 0


def place(device: str, ranks: int, replica: int = 0, replicas: int = 1) -> tuple[tuple[str, ...], str]:
    """(device of each rank, device of the codec) for `device` "auto", "cpu" or "cuda", of one of several replicas.

    On GPUs each replica has cards of its own, rank r the r-th of them, and its codec a card that is left over or else the
    last rank's. Raises `RequestError` when there are fewer cards than ranks (NCCL refuses two ranks on one card).
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device={device!r} is not known; use auto, cpu or cuda", "device")
    num_gpus, needed = count_gpus(), ranks * replicas
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return ("cpu",) * ranks, "cpu"
    if num_gpus < needed:
        asked = f"ranks={ranks}" + (f" with replicas={replicas}" if replicas > 1 else "")
        raise RequestError(f"{asked} needs {needed} GPUs, {num_gpus} are visible; use fewer ranks or device cpu", "ranks")
    first = ranks * replica
    spare = needed + replica
    codec = spare if spare < num_gpus else first + ranks - 1
    return tuple(f"cuda:{first + rank}" for rank in range(ranks)), f"cuda:{codec}"


def place_hosts(device: str, ranks: int, local_ranks: int) -> tuple[tuple[str, ...], str]:
    """As `place`, for one pipeline over several hosts of which this one, the first, has `local_ranks` ranks.

    The codec stays on this host. What the other hosts' devices are called, they know themselves.
    """
    local, codec = place(device, local_ranks)
    return tuple(local[rank % local_ranks] for rank in range(ranks)), codec


def bytes_per_device(device: str) -> int | None:
    """Memory that one device has: "cpu" the host's (or this container's limit), else what the smallest visible card (or slice)
    can give, without the driver's own and `KEPT_SHARE` of it, which is never all in one piece.

    None when there is no such device or its memory is not known.
    """
    if device == "cpu":
        return usable_bytes()
    smallest = min((gpu.num_bytes for gpu in visible_gpus()), default=None)
    return None if smallest is None else int(smallest * (1 - KEPT_SHARE))


def check_dtype(dtype: str) -> None:
    """Raises `RequestError` for bfloat16 where a visible card has no arithmetic for it: attention would fall back to a form
    whose scores fill the memory."""
    lowest = min((gpu.capability for gpu in visible_gpus() if gpu.capability is not None), default=BFLOAT16_SINCE)
    if dtype == "bfloat16" and lowest < BFLOAT16_SINCE:
        what = "a GPU of compute capability {}.{}".format(*lowest)
        raise RequestError(
            f"dtype=bfloat16 needs GPUs of compute capability 8.0 or more (Ampere and later), and there is {what}; "
            "use dtype=float16, or leave that GPU out with CUDA_VISIBLE_DEVICES",
            "dtype",
        )


def use_pci_order() -> None:
    """Let CUDA number cards as `nvidia-smi` does, whose memory is planned with, not the fastest first. Before CUDA starts, in
    every process that uses a card."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
