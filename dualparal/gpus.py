"""The GPUs that CUDA would show to this process, by their memory, without starting CUDA in it.

`nvidia-smi` lists cards and their MIG slices, and CUDA_VISIBLE_DEVICES is read as the driver reads it; where there is no
`nvidia-smi` (small containers, WSL2) a short-lived process asks the driver's own library, which knows both.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables and the MIG user guide. Needs no torch.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

WSL_PROGRAM = "/usr/lib/wsl/lib/nvidia-smi"  # not always on the PATH there
DRIVER = "libcuda.so.1"
TIMEOUT_S = 30
CARD = "--query-gpu=index,uuid,mig.mode.current,memory.total,memory.reserved,compute_cap"
ASK_DRIVER = """
import ctypes, sys
cuda, count, size = ctypes.CDLL(sys.argv[1]), ctypes.c_int(), ctypes.c_size_t()
def capability(device, number=ctypes.c_int()):
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        yield str(number.value)
if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for device in range(count.value):
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        print(size.value, ".".join(capability(device)))
"""


@dataclass(frozen=True)
class Gpu:
    """A card or a MIG slice. `num_bytes` of memory without what the driver keeps for itself; `capability`: what CUDA calls its
    compute capability, None where nobody tells; `is_divided`: only its `slices` can be used."""

    uuid: str
    num_bytes: int
    capability: tuple[int, int] | None = None
    is_divided: bool = False
    slices: tuple[Gpu, ...] = ()


def visible_gpus() -> tuple[Gpu, ...]:
    """The devices that CUDA would show, in its order; () without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and not named.strip():
        return ()
    program = shutil.which("nvidia-smi") or shutil.which(WSL_PROGRAM)
    try:
        if program is not None:
            cards = _listed(program, Path(program).stat().st_mtime_ns)
            return tuple(choose(cards, named))
    except (OSError, subprocess.SubprocessError, ValueError):
        pass  # it does not answer: perhaps the driver itself does
    return _from_driver(named, DRIVER)


def choose(cards: Sequence[Gpu], named: str | None) -> list[Gpu]:
    """Of `cards` those that CUDA_VISIBLE_DEVICES=`named` leaves, in its order (None: it is not set).

    A name is an index, the beginning of a card's or slice's UUID, or MIG-<card>/<GPU instance>/<compute instance>. The list
    ends at the first name that does not stand for one device; one that is named twice leaves none. A process sees either
    cards or a single slice.
    """
    chosen: list[Gpu] = []
    for name in [str(index) for index in range(len(cards))] if named is None else named.split(","):
        found = _named(cards, name.strip())
        if found is None:
            break
        if found in chosen:
            return []
        chosen.append(found)
    slices = [part for card in cards for part in card.slices]
    whole = [gpu for gpu in chosen if not gpu.is_divided and gpu not in slices]
    parts = [part for gpu in chosen for part in (gpu.slices if gpu.is_divided else (gpu,)) if part in slices]
    return whole or parts[:1]


def _named(cards: Sequence[Gpu], name: str) -> Gpu | None:
    """The device of one name. Numbers are read as C reads them: "0x" is 0."""
    if number := re.match(r"\+?(\d+)", name):
        return cards[int(number[1])] if int(number[1]) < len(cards) else None
    if not name.startswith(("GPU-", "MIG-")):
        return None
    known = [*cards, *(part for card in cards for part in card.slices)]
    found = [gpu for gpu in known if gpu.uuid.lower().startswith(name.lower())]
    if not found and name.startswith("MIG-GPU-"):  # the old way, which newer drivers take but do not list: any slice of it
        found = [part for card in cards for part in card.slices[:1] if name[4:].startswith(f"{card.uuid}/")]
    return found[0] if len(found) == 1 else None


@functools.lru_cache(maxsize=4)
def _listed(program: str, changed_ns: int) -> tuple[Gpu, ...]:
    """What `nvidia-smi` lists; asked once, as it takes up to seconds. Raises OSError, SubprocessError or ValueError."""
    rows = [[cell.strip() for cell in row.split(",")] for row in _ask(program, CARD, "--format=csv,noheader,nounits")]
    slices = _slices(_ask(program, "-L")) if any(row[2:3] == ["Enabled"] for row in rows) else {}
    cards = []
    for _, uuid, mig, total, reserved, version in rows:
        mib = int(total) - int(reserved if reserved.isdigit() else 0) if total.isdigit() else None
        capability = _capability(version)
        parts = tuple(replace(part, capability=capability) for part in slices.get(uuid, ()))
        num_bytes = _host_bytes() if mib is None else mib * 2**20
        cards.append(Gpu(uuid, num_bytes, capability, mig == "Enabled", parts))
    return tuple(cards)


def _capability(version: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _host_bytes() -> int:
    """Of a card that shares the host's memory and lists none of its own."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _slices(lines: Sequence[str]) -> dict[str, list[Gpu]]:
    """MIG slices by their card's UUID, from `nvidia-smi -L`; a slice's name says its gigabytes: 1g.5gb."""
    found: dict[str, list[Gpu]] = {}
    card = ""
    for line in lines:
        if of_card := re.match(r"GPU \d+:.*\(UUID: (GPU-[^)]+)\)", line):
            card = of_card[1]
        elif of_slice := re.match(r"\s+MIG \S*?(\d+)gb\S*\s.*\(UUID: (MIG-[^)]+)\)", line):
            found.setdefault(card, []).append(Gpu(of_slice[2], int(of_slice[1]) * 10**9))
    return found


@functools.lru_cache(maxsize=4)
def _from_driver(named: str | None, library: str) -> tuple[Gpu, ...]:
    """What the driver's library shows to a new process with this one's CUDA_VISIBLE_DEVICES, which is `named`."""
    import ctypes

    try:
        ctypes.CDLL(library)  # loading starts nothing
    except OSError:
        return ()
    try:
        lines = _ask(sys.executable, "-I", "-c", ASK_DRIVER, library)
        told = [line.split() for line in lines]
        return tuple(Gpu(str(index), int(size), _capability(version)) for index, (size, version) in enumerate(told))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _ask(*command: str) -> list[str]:
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=environment)
    return [line for line in done.stdout.splitlines() if line.strip()]
