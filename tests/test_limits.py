"""What a process may use of its host: made-up trees of control groups, and the threads that follow from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualparal.limits import (
    ALLOCATOR,
    PASSIVE_WAITING,
    default_threads,
    grow_in_place,
    usable_bytes,
    usable_cpus,
    wait_passively,
)

V1 = "6:cpu,cpuacct:{path}\n5:memory:{path}\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
V2 = "0::{path}\n"
V2_MOUNT = "35 31 0:32 {top} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture(autouse=True)
def _many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def tree(root: Path, cgroup: str, mounts: str | None, **files: str) -> Path:
    """`files`: path below /sys/fs/cgroup ("__" for a slash) to text."""
    _write(root / "proc/self/cgroup", cgroup)
    if mounts is not None:
        _write(root / "proc/self/mountinfo", mounts)
    for name, text in files.items():
        _write(root / "sys/fs/cgroup" / name.replace("__", "/"), text)
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(root: Path, path: str = "/a/b", top: str = "/", **files: str) -> Path:
    named = {name.replace("_max", ".max").replace("_high", ".high"): text for name, text in files.items()}
    return tree(root, V2.format(path=path), V2_MOUNT.format(top=top, at="/sys/fs/cgroup"), **named)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({"a__b__cpu_max": "max 100000"}, 16),
        ({"a__b__cpu_max": "200000 100000"}, 2),
        ({"a__b__cpu_max": "350000 100000"}, 3),
        ({"a__b__cpu_max": "50000 100000"}, 1),  # half a CPU still makes one thread
        ({"a__cpu_max": "400000 100000", "a__b__cpu_max": "max 100000"}, 4),  # the parent's
        ({"cpu_max": "300000 100000", "a__b__cpu_max": "800000 100000"}, 3),  # the one at the top in sight
        ({"a__c__cpu_max": "100000 100000"}, 16),  # a neighbour's
        ({"a__b__cpu_max": "nonsense"}, 16),
    ],
)
def test_cpu_quota_of_version_2(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(v2(tmp_path, **files)) == cpus


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"a__b__memory_max": "1000000"}, 10**6),
        ({"a__memory_max": "2000000", "a__b__memory_max": "max"}, 2 * 10**6),
        ({"memory_max": "500000", "a__b__memory_max": "1000000"}, 500_000),
        ({"a__b__memory_high": "3000000", "a__b__memory_max": "max"}, 3 * 10**6),
        ({"a__b__memory_max": "max"}, None),
    ],
)
def test_memory_limit_of_version_2(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert usable_bytes(v2(tmp_path, **files)) == (limit or usable_bytes(tmp_path / "nothing"))


@pytest.mark.parametrize(("top", "below"), [("/", "docker/x/"), ("/docker/x", ""), ("/docker", "x/")])
def test_limits_of_version_1(tmp_path: Path, top: str, below: str) -> None:
    """As a host shows them, as a container does that is shown its own group only, and nested mounts."""
    root = tree(tmp_path, V1.format(path="/docker/x"), V1_MOUNTS.format(top=top))
    groups = root / "sys/fs/cgroup"
    _write(groups / "cpu,cpuacct" / below / "cpu.cfs_quota_us", "300000")
    _write(groups / "cpu,cpuacct" / below / "cpu.cfs_period_us", "100000")
    _write(groups / "memory" / below / "memory.limit_in_bytes", "1234567")
    assert (usable_cpus(root), usable_bytes(root)) == (3, 1234567)
    _write(groups / "cpu,cpuacct" / below / "cpu.cfs_quota_us", "-1")  # no quota
    _write(groups / "memory" / below / "memory.limit_in_bytes", "9223372036854771712")
    assert (usable_cpus(root), usable_bytes(root)) == (16, usable_bytes(tmp_path / "nothing"))


def test_parents_of_version_1_count(tmp_path: Path) -> None:
    root = tree(tmp_path, V1.format(path="/batch/job/step"), V1_MOUNTS.format(top="/"))
    _write(root / "sys/fs/cgroup/memory/batch/memory.limit_in_bytes", "7000")
    _write(root / "sys/fs/cgroup/memory/batch/job/step/memory.limit_in_bytes", "8000")
    assert usable_bytes(root) == 7000


def test_both_versions_at_once_and_odd_mount_points(tmp_path: Path) -> None:
    mounts = V1_MOUNTS.format(top="/") + V2_MOUNT.format(top="/", at="/mnt/with\\040blank")
    root = tree(tmp_path, V1.format(path="/") + V2.format(path="/session"), mounts)
    _write(root / "mnt/with blank/session/cpu.max", "100000 50000")
    assert usable_cpus(root) == 2


def test_a_group_outside_the_view_is_read_at_the_mount(tmp_path: Path) -> None:
    """A container with a view of its own, entered from outside: the path leads up and out of it."""
    assert usable_cpus(v2(tmp_path, path="/../other", cpu_max="200000 100000")) == 2


def test_without_a_list_of_mounts_the_usual_places_count(tmp_path: Path) -> None:
    root = tree(tmp_path, V2.format(path="/"), None)
    _write(root / "sys/fs/cgroup/cpu.max", "500000 100000")
    assert usable_cpus(root) == 5
    assert usable_cpus(tmp_path / "nothing") == 16


def test_threads_share_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "nothing"
    assert [default_threads(ranks, root) for ranks in (1, 2, 4, 15, 16, 99)] == [15, 7, 3, 1, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})  # two cores: the codec has one, whatever the ranks
    assert [default_threads(ranks, root) for ranks in (1, 2, 4)] == [1, 1, 1]
    assert default_threads(1, v2(tmp_path, a__b__cpu_max="100000 100000")) == 1


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}])
def test_waiting_is_passive_unless_the_user_says_how(own: dict[str, str]) -> None:
    environment = dict(own)
    wait_passively(environment)
    assert environment == (own or PASSIVE_WAITING)


@pytest.mark.parametrize("name", sorted(ALLOCATOR))
def test_the_allocator_grows_in_place_unless_the_user_has_set_it_up(name: str) -> None:
    own = {name: "backend:cudaMallocAsync"}
    untouched = dict(own)
    grow_in_place(own)
    assert own == untouched
    environment: dict[str, str] = {}
    grow_in_place(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_workers_set_up_waiting_and_allocator_before_torch_is_loaded() -> None:
    """Torch reads the environment once, when it is loaded."""
    script = (
        "import os, sys\n"
        "from types import SimpleNamespace\n"
        "import dualparal.ring.spawn as spawn\n"
        "class Probe:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('PYTORCH_ALLOC_CONF'), flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Probe())\n"
        "options = SimpleNamespace(engine=SimpleNamespace(compile=False))\n"
        "getattr(spawn, sys.argv[1])(*[None] * int(sys.argv[2]), options)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {*PASSIVE_WAITING, *ALLOCATOR}}
    for entry, arguments in (("_run_rank", "2"), ("_run_codec", "1"), ("_run_baseline", "1")):
        command = [sys.executable, "-c", script, entry, arguments]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout == "PASSIVE expandable_segments:True\n", done.stderr
