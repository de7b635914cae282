"""One pipeline over two torchrun agents, as over two hosts: the bits of one host, a named error when one is gone, recovery."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from dualparal import Engine
from dualparal.network import LOST_AFTER_S
from tests.conftest import wait_until
from tests.distributed.two_hosts import REQUEST, SMALL

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Hosts:
    """Two agents; `prefix` is the command that runs something on the first or second "host"."""

    def __init__(
        self, checkpoint: Path, folder: Path, addresses: tuple[str, str], prefixes: tuple[list[str], list[str]]
    ) -> None:
        self.folder, self._checkpoint, self._addresses, self._prefixes = folder, checkpoint, addresses, prefixes
        self._port = str(20_000 + os.getpid() % 10_000)
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        command = [
            *self._prefixes[node], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--node-rank", str(node), "--master-addr", self._addresses[0], "--master-port", self._port,
            "--local-addr", self._addresses[node], "--log-dir", str(self.folder / "torchrun"),
            "-m", "tests.distributed.two_hosts", str(self._checkpoint), str(self.folder),
        ]  # fmt: skip
        with (self.folder / f"host{node}.log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.agents[node] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def kill(self, node: int) -> None:
        """All at once, as when the power goes."""
        started = self.agents.pop(node)
        agent = psutil.Process(started.pid)
        for process in [agent, *agent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        started.wait()

    def wait_for(self, name: str) -> bytes:
        path = self.folder / name
        deadline_s = time.monotonic() + SECONDS
        while not path.exists():
            for node, agent in self.agents.items():
                assert agent.poll() in (None, 0), f"host {node} ended early:\n{self.logs()}"
            assert time.monotonic() < deadline_s, f"no {name}:\n{self.logs()}"
            time.sleep(0.1)
        return path.read_bytes()

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def two_hosts(
    checkpoint: Path,
    folder: Path,
    addresses: tuple[str, str],
    prefixes: tuple[list[str], list[str]] = ([], []),
) -> Iterator[Hosts]:
    folder.mkdir()
    hosts = Hosts(checkpoint, folder, addresses, prefixes)
    try:
        for node in (0, 1):
            hosts.start(node)
        yield hosts
    finally:
        for node, agent in list(hosts.agents.items()):
            if agent.poll() is None:
                hosts.kill(node)


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bits of one process on one host."""
    with Engine(tiny, preset=SMALL, device="cpu", threads=1, outputs=tmp_path_factory.mktemp("solo")) as engine:
        latents = engine.submit(REQUEST, return_latents=True).result(SECONDS).latents
        assert latents is not None
        return np.asarray(latents).tobytes()


def run_through_a_loss(hosts: Hosts, expected: bytes, cut: Callable[[], None], mend: Callable[[], None]) -> None:
    assert hosts.wait_for("first.npy") == expected
    hosts.wait_for("running")
    cut()
    error = hosts.wait_for("error.txt").decode()
    assert error.startswith("WorkerDied: the connection to rank 1 on "), error
    mend()
    assert hosts.wait_for("again.npy") == expected
    assert [agent.wait(60) for agent in hosts.agents.values()] == [0, 0], hosts.logs()


def test_a_host_that_dies_and_comes_back(tiny: Path, tmp_path: Path, expected: bytes, leaves_nothing: None) -> None:
    with two_hosts(tiny, tmp_path / "hosts", ("127.0.0.1", "127.0.0.2")) as hosts:
        workers = json.loads(hosts.wait_for("workers.json"))
        for worker in workers.values():
            ports = psutil.Process(worker["pid"]).net_connections(kind="inet")
            assert all(p.laddr.ip.startswith("127.0.0.") for p in ports if p.status == psutil.CONN_LISTEN), ports
        run_through_a_loss(hosts, expected, cut=lambda: hosts.kill(1), mend=lambda: hosts.start(1))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable: 10.91.0.1 and 10.91.0.2."""
    names = (f"dualparal-{os.getpid()}-a", f"dualparal-{os.getpid()}-b")
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.91.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)


def test_a_pulled_cable(tiny: Path, tmp_path: Path, expected: bytes, namespaces: tuple[str, str], leaves_nothing: None) -> None:
    """No word from the other host: noticed by its silence. The agents stay as they are, and the pipeline finds itself again."""
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    with two_hosts(tiny, tmp_path / "hosts", ("10.91.0.1", "10.91.0.2"), (prefixes[0], prefixes[1])) as hosts:
        run_through_a_loss(
            hosts,
            expected,
            cut=lambda: ip("-n", namespaces[1], "link", "set", "cable", "down"),
            mend=lambda: (
                wait_until(lambda: False, LOST_AFTER_S / 4),  # the other side has to notice too
                ip("-n", namespaces[1], "link", "set", "cable", "up"),
            )[1],
        )
