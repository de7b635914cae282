"""How much of its host this process may use: CPUs and memory, as affinity and control groups leave them, and from that the
threads of worker processes.

A control group's limit holds for all groups below it, so the process's own and every parent in sight count, in both versions
of the interface (https://docs.kernel.org/admin-guide/cgroup-v2.html). `root` is where the host's files begin. No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

ROOT = Path("/")
# Idle threads sleep instead of spinning, in the words of every OpenMP library that torch may have been built with.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"}


def wait_passively(environment: MutableMapping[str, str] | None = None) -> None:
    """Let idle threads sleep, unless the user has said how they wait: spinning ones take the CPUs from whatever else runs.

    Before torch is loaded, in `environment` (default: this process's).
    """
    environment = os.environ if environment is None else environment
    if not environment.keys() & {*PASSIVE_WAITING, "KMP_LIBRARY"}:
        environment.update(PASSIVE_WAITING)


def grow_in_place(environment: MutableMapping[str, str] | None = None) -> None:
    """Let torch's allocator enlarge its pieces of a card's memory, unless the user has set it up: windows and texts of many
    sizes leave holes otherwise that nothing fits into. Before torch is loaded, in `environment` (default: this process's).
    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    environment = os.environ if environment is None else environment
    if not environment.keys() & ALLOCATOR:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def default_threads(ranks: int, root: Path = ROOT) -> int:
    """CPU threads of each of `ranks` ranks on this host, at least 1; one CPU is left to codecs, front end and browser."""
    return max(1, (usable_cpus(root) - 1) // ranks)


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: its affinity, or less where a control group has a quota; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([affinity, *(int(quota) for quota in quotas)]))


def usable_bytes(root: Path = ROOT) -> int:
    """Memory that this process may use: the host's, or less where a control group has a limit."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host, *(limit for folder in _groups("memory", root) if (limit := _memory_limit(folder)) is not None)])


def _cpu_quota(folder: Path) -> float | None:
    """CPUs that a group may keep busy on average."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us").strip(),
        _read(folder / "cpu.cfs_period_us").strip(),
    ]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:  # "max", -1, or no quota at all
        return None
    return int(words[0]) / int(words[1])


def _memory_limit(folder: Path) -> int | None:
    """Bytes that a group may use. `memory.high` is a limit as well: beyond it a group is throttled to a standstill."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    found = [int(text) for name in names if (text := _read(folder / name).strip()).isdigit()]
    return min(found, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's group and of all its parents, wherever `controller` is mounted."""
    paths: dict[str, str] = {}  # by controller; "" is version 2
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)
    mounts = list(_mounts(root)) or [("", "/", "/sys/fs/cgroup"), (controller, "/", f"/sys/fs/cgroup/{controller}")]
    for name, top, mount_point in mounts:
        if name not in ("", controller):
            continue
        base = root / mount_point.lstrip("/")
        yield base
        folder = base
        for part in _below(paths.get(name, "/"), top):
            folder = folder / part
            yield folder


def _below(path: str, top: str) -> list[str]:
    """The parts of a group's `path` under the group `top` that a mount shows; [] where it lies outside, as seen from within a
    container that has a view of its own."""
    group, shown = ([part for part in whole.split("/") if part] for whole in (path, top))
    is_inside = group[: len(shown)] == shown and ".." not in group
    return group[len(shown) :] if is_inside else []


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """(controller, group at its top, mount point) of every mounted hierarchy; the controller of version 2 is ""."""
    unescaped: Callable[[str], str] = lambda text: re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), text)  # noqa: E731
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        for name in kind[2].split(",") if kind[0] == "cgroup" else [""]:
            yield name, unescaped(fields[3]), unescaped(fields[4])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such limit here
        return ""
