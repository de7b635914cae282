"""What every test gets: tiny checkpoints, one torch thread, markers by folder, and a guard against what is left behind."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from dualparal import Engine
    from tests.fake_group import GroupLog

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Embeddings and calibrations of tests stay out of the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="dualparal-test-cache-", ignore_cleanup_errors=True)
os.environ.setdefault("DUALPARAL_CACHE", _cache.name)

FOLDER_MARKS = ("distributed", "browser", "gpu")
GONE_WITHIN_S = 10.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of tests/distributed get the marker `distributed`, and so on."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            folder = item.path.relative_to(here).parts[0]
            if folder in FOLDER_MARKS:
                item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Equal bits need equal threads; tests also share few cores."""
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


def _checkpoint(tmp_path_factory: pytest.TempPathFactory, name: str, **options: object) -> Path:
    import torch

    from dualparal.model.tiny import write_tiny_checkpoint

    torch.set_num_threads(1)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / name, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert, four layers."""
    return _checkpoint(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, three layers each, in the layout of Wan2.2; boundary_ratio 0.875."""
    return _checkpoint(tmp_path_factory, "two experts", num_experts=2, num_layers=3, seed=1)


@pytest.fixture(scope="session")
def tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert, four layers, in the layout of Wan2.2-TI2V-5B: 16 pixels to a latent's, timesteps of the tokens' own."""
    return _checkpoint(tmp_path_factory, "ti2v", kind="ti2v", seed=3)


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert, seven layers, its DiT spread over many small safetensors files."""
    return _checkpoint(tmp_path_factory, "sharded", num_layers=7, max_shard_size="20KB", seed=2)


# What a test of processes leaves behind


def _children() -> list[psutil.Process]:
    """Child processes, all generations, without Python's own resource tracker and what has ended but is not reaped."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            is_tracker = any("resource_tracker" in word for word in child.cmdline())
            if not is_tracker and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def _listening() -> set[int]:
    """Ports that this process and its children listen on."""
    ports = set()
    for process in [psutil.Process(), *_children()]:
        try:
            ports |= {c.laddr.port for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return ports


def wait_until(condition: object, timeout_s: float = GONE_WITHIN_S) -> bool:
    """Whether `condition()` becomes true within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session")
def private_tmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary folder of this process and its children, so that what they leave in it can be seen."""
    folder = tmp_path_factory.mktemp("tmp")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    named, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder)
    yield folder
    tempfile.tempdir = before
    os.environ.pop("TMPDIR")
    if named is not None:
        os.environ["TMPDIR"] = named


@pytest.fixture
def leaves_nothing(private_tmp: Path) -> Iterator[None]:
    """Fail a test that leaves more processes or listening ports than it found, or temporary files, or open pipes."""
    num_children, num_ports, files = len(_children()), len(_listening()), set(private_tmp.iterdir())
    num_open = psutil.Process().num_fds()
    yield
    assert wait_until(lambda: len(_children()) <= num_children), f"processes left behind: {_children()}"
    assert wait_until(lambda: len(_listening()) <= num_ports), "a listening port was left behind"
    assert set(private_tmp.iterdir()) <= files, "temporary files were left behind"

    def is_tidy() -> bool:
        gc.collect()
        return psutil.Process().num_fds() <= num_open + 2  # the resource tracker's pipe is opened once

    assert wait_until(is_tidy), "open files or pipes were left behind"


# Engines without processes, for tests of what happens around the workers.


@pytest.fixture
def group_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupLog]:
    from tests.fake_group import fake_groups

    with fake_groups(monkeypatch) as found:
        yield found


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path, group_log: GroupLog) -> Iterator[Callable[..., Engine]]:
    """Makes engines, of the tiny model if nothing else is asked for, and closes them."""
    from dualparal import Engine

    made: list[Engine] = []

    def engine(model: Path | str | None = None, **options: Any) -> Engine:
        model = model or request.getfixturevalue("tiny")
        made.append(Engine(model, **{"outputs": tmp_path / "outputs", "device": "cpu", "threads": 1, **options}))
        return made[-1]

    yield engine
    group_log.let_go.set()
    for one in made:
        one.close()
