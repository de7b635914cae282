"""Ranks on other hosts, without processes: who is let in, whose messages count, how a loss is told, who may host what."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest

from dualparal import devices, network
from dualparal.devices import place_hosts
from dualparal.errors import EngineError, RequestError
from dualparal.gpus import Gpu
from dualparal.hosts import host as host_module
from dualparal.hosts import listener as listener_module
from dualparal.hosts.host import RankHost
from dualparal.hosts.listener import HostListener, RemoteWorker
from dualparal.hosts.messages import Farewell, Hello, RankBegun, RankEnded, StartRank, StopRank
from dualparal.hosts.torchrun import SECRET_VARIABLE, Notice, Team, find_team, settle_ranks
from dualparal.messages import Beat, StorePort, WorkerError, WorkerOptions
from dualparal.options import EngineOptions
from dualparal.ring.rank_process import open_store

TEAM = Team(rank=0, ranks=3, local_rank=0, local_ranks=1, master_addr="127.0.0.1", master_port=1, run_id="test")
OPTIONS = WorkerOptions(
    EngineOptions(ranks=3, text_encoder="keep", dtype="float32", threads=1, timeout_s=60.0),
    folder="/first/model", layers=(range(2), range(2, 3), range(3, 4)), devices=("cpu",) * 3, codec_device="cpu",
)  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host-a", "MASTER_PORT": "29500",
}  # fmt: skip


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostListener]:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.setattr(listener_module, "leave_notice", lambda team, notice: None)
    listening = HostListener(TEAM)
    yield listening
    listening.close()


def come(listener: HostListener, rank: int) -> Connection:
    connection, _ = network.dial(listener.notice.host, listener.notice.port, listener.notice.shared_key(TEAM))
    connection.send(Hello(rank, "host-b"))
    return connection


# The team


def test_torchrun_is_recognised_by_its_variables() -> None:
    assert find_team({}) is None
    assert find_team({"RANK": "0", "WORLD_SIZE": "1"}) is None
    team = find_team(TORCHRUN)
    assert team is not None and not team.is_front_end
    assert (team.rank, team.ranks, team.local_rank, team.local_ranks, team.master_port) == (5, 8, 1, 4, 29500)
    with pytest.raises(RequestError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        find_team({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"})


def test_flags_that_contradict_torchrun_are_refused() -> None:
    assert settle_ranks(None, 5, 2) == 5
    assert settle_ranks(TEAM, 1, 1) == settle_ranks(TEAM, 3, 1) == 3
    with pytest.raises(RequestError, match="leave ranks out"):
        settle_ranks(TEAM, 2, 1)
    with pytest.raises(RequestError, match="replicas=2"):
        settle_ranks(TEAM, 1, 2)


def test_a_secret_is_needed_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s3cret")
    secretive = Notice(host="a", port=1, key="")
    key = secretive.shared_key(TEAM)
    assert key != secretive.shared_key(dataclasses.replace(TEAM, run_id="other")), "a key serves one run"
    monkeypatch.delenv(SECRET_VARIABLE)
    with pytest.raises(EngineError, match=SECRET_VARIABLE):
        secretive.shared_key(TEAM)


def test_devices_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_hosts("cpu", 4, 2) == (("cpu",) * 4, "cpu")
    monkeypatch.setattr(devices, "visible_gpus", lambda: (Gpu("a", 10**9), Gpu("b", 10**9)))
    assert place_hosts("cuda", 4, 2) == (("cuda:0", "cuda:1", "cuda:0", "cuda:1"), "cuda:1"), "the codec stays on this host"
    with pytest.raises(RequestError, match="3 GPUs, 2 are visible"):
        place_hosts("cuda", 6, 3)


# Who is let in


def test_a_wrong_key_and_silence_are_turned_away(listener: HostListener, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        network.dial(listener.notice.host, listener.notice.port, b"guessed")
    monkeypatch.setattr(network, "HANDSHAKE_S", 1)
    with socket.create_connection((listener.notice.host, listener.notice.port)) as silent:
        silent.settimeout(20)
        while silent.recv(4096):  # the challenge, then the end
            pass
    assert listener.host_of(1) is None


def test_only_ranks_of_the_pipeline_are_let_in(listener: HostListener) -> None:
    for rank in (0, 3):
        with come(listener, rank) as stranger, pytest.raises((EOFError, OSError)):
            stranger.recv()
    with come(listener, 2):
        until(lambda: listener.host_of(2))
        assert listener.news.poll()
        assert listener.interface() == "lo"


def test_a_rank_that_comes_again_replaces_the_older_one(listener: HostListener) -> None:
    with come(listener, 1) as old:
        until(lambda: listener.host_of(1))
        worker = RemoteWorker(listener, 1, listener.next_generation(), OPTIONS)
        assert worker.call()
        with come(listener, 1) as new:
            assert isinstance(old.recv(), StartRank)
            assert isinstance(old.recv(), Farewell)
            until(lambda: worker.read() or worker.is_lost)
            again = RemoteWorker(listener, 1, listener.next_generation(), OPTIONS)
            assert again.call()
            assert isinstance(new.recv(), StartRank)


def test_a_farewell_arrives_though_nobody_reads_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "leave_notice", lambda team, notice: None)
    closing = HostListener(TEAM)
    with come(closing, 1) as host:
        until(lambda: closing.host_of(1))
        for _ in range(100):
            host.send(Beat("rank 1"))
        thread = threading.Thread(target=closing.close)
        thread.start()
        assert isinstance(host.recv(), Farewell)
    thread.join()


# Whose messages count


def test_a_remote_worker_from_its_start_to_its_end(listener: HostListener) -> None:
    with come(listener, 1) as host:
        until(lambda: listener.host_of(1))
        worker = RemoteWorker(listener, 1, listener.next_generation(), OPTIONS)
        assert not worker.is_alive() and worker.call() and worker.is_alive()
        order = host.recv()
        assert isinstance(order, StartRank) and order.options == OPTIONS
        host.send(Beat("rank 1"))  # of the worker before
        host.send(RankEnded(order.generation - 1, -9))
        host.send(RankBegun(order.generation))
        host.send(Beat("rank 1", 5))
        found: list[Any] = []
        until(lambda: found.extend(worker.read()) or found)
        assert found == [Beat("rank 1", 5)] and worker.exitcode is None
        worker.kill()
        assert isinstance(host.recv(), StopRank)
        host.send(RankEnded(order.generation, -9))
        until(lambda: worker.read() or worker.has_ended)
        assert worker.exitcode == -9 and not worker.is_lost and not worker.is_alive()


def test_a_host_that_goes_is_a_loss_with_a_name(listener: HostListener) -> None:
    with come(listener, 1):
        until(lambda: listener.host_of(1))
        worker = RemoteWorker(listener, 1, listener.next_generation(), OPTIONS)
        worker.call()
    until(lambda: worker.read() or worker.has_ended)
    assert worker.is_lost and worker.line is None and listener.host_of(1) is None
    assert "rank 1 on host-b was lost" in worker.describe_loss()
    assert not worker.call(), "the next group has a worker of its own"


# The host's side


class FakeProcess:
    def __init__(self) -> None:
        self.sentinel, self._held = socket.socketpair()
        self.exitcode: int | None = None

    def end(self, exitcode: int) -> None:
        self.exitcode = exitcode
        self._held.close()

    def kill(self) -> None:
        if self.exitcode is None:
            self.end(-9)

    def join(self) -> None: ...

    def close(self) -> None:
        self.sentinel.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeProcess, Connection, WorkerOptions]]:
    """Workers that hosts have started: (process, the worker's end of its line, options)."""
    found: list[tuple[FakeProcess, Connection, WorkerOptions]] = []

    def start(rank: int, options: WorkerOptions, *queues: None) -> tuple[FakeProcess, Connection]:
        from multiprocessing import Pipe

        here, there = Pipe()
        found.append((FakeProcess(), there, options))
        return found[-1][0], here

    monkeypatch.setattr(host_module, "start_rank", start)
    return found


@pytest.fixture
def front_end(listener: HostListener) -> Iterator[tuple[RemoteWorker, threading.Thread, list[bool]]]:
    """A host of rank 1 at work in a thread, and the front end's handle on it; what `serve` returned."""
    mine = dataclasses.replace(OPTIONS, folder="/second/model")
    connection, own = network.dial(listener.notice.host, listener.notice.port, listener.notice.shared_key(TEAM))
    connection.send(Hello(1, "host-b"))
    at_work = RankHost(dataclasses.replace(TEAM, rank=1), mine, connection, "10.0.0.1", own)
    ends: list[bool] = []
    leaving = threading.Event()

    def work() -> None:
        ends.append(at_work.serve(leaving))
        at_work.end_worker()
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: listener.host_of(1))
    yield RemoteWorker(listener, 1, listener.next_generation(), OPTIONS), thread, ends
    leaving.set()
    thread.join()


def test_a_host_relays_and_tells_the_end(
    listener: HostListener, front_end: Any, started: list[tuple[FakeProcess, Connection, WorkerOptions]]
) -> None:
    worker, thread, ends = front_end
    worker._options = dataclasses.replace(OPTIONS, listen_address=listener.address)
    worker.call()
    until(lambda: started)
    process, line, options = started[0]
    assert options.listen_address == "127.0.0.1", "a rank knows that there are other hosts"
    assert options.folder == "/second/model", "each host has files of its own"
    assert abs(options.clock_ahead_s) < 5
    assert worker.line is not None
    worker.line.send(StorePort(1234, interface=None))
    assert line.recv() == StorePort(1234, "10.0.0.1", "lo")
    line.send(Beat("rank 1"))
    found: list[Any] = []
    until(lambda: found.extend(worker.read()) or found)
    assert found == [Beat("rank 1")]
    line.send(Beat("rank 1", 7))  # the last words come before the end
    line.close()
    process.end(-11)
    until(lambda: found.extend(worker.read()) or worker.has_ended)
    assert found[1:] == [Beat("rank 1", 7)] and worker.exitcode == -11
    listener.close()
    thread.join(20)
    assert ends == [True]


def test_a_host_that_loses_the_front_end_kills_its_worker(
    listener: HostListener, front_end: Any, started: list[tuple[FakeProcess, Connection, WorkerOptions]]
) -> None:
    worker, thread, ends = front_end
    worker.call()
    until(lambda: started)
    listener.drop(1, worker.line)
    thread.join(20)
    assert ends == [False] and started[0][0].exitcode == -9
    started[0][1].close()


def test_hosts_with_other_flags_are_named(
    listener: HostListener, front_end: Any, started: list[tuple[FakeProcess, Connection, WorkerOptions]]
) -> None:
    worker, _, _ = front_end
    worker._options = dataclasses.replace(OPTIONS, engine=OPTIONS.engine.settled(dtype="bfloat16"))
    worker.call()
    found: list[Any] = []
    until(lambda: found.extend(worker.read()) or found)
    assert isinstance(found[0], WorkerError) and found[0].kind == "RequestError"
    assert "dtype=float32, rank 0 with bfloat16" in found[0].message
    assert not started


@pytest.mark.parametrize(("address", "listens_on"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("", "0.0.0.0")])
def test_the_store_listens_where_the_front_end_does(address: str, listens_on: str) -> None:
    def listening() -> set[tuple[str, int]]:
        return {tuple(c.laddr) for c in psutil.Process().net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}

    before = listening()
    store = open_store(address, 2, datetime.timedelta(seconds=60))
    assert listening() - before == {(listens_on, store.port)}
    store.set("key", "value")
    assert store.get("key") == b"value"
    del store
    until(lambda: listening() == before)


def test_a_host_with_less_memory_is_no_other_command(
    listener: HostListener, front_end: Any, started: list[tuple[FakeProcess, Connection, WorkerOptions]]
) -> None:
    """Where `text_encoder=auto` came to something else by its own memory: the codec is on the first host, whose word counts."""
    worker, _, _ = front_end
    worker._options = dataclasses.replace(OPTIONS, engine=OPTIONS.engine.settled(text_encoder="free"))
    worker.call()
    until(lambda: started)
    assert OPTIONS.engine.text_encoder == "keep" and started[0][2].engine.text_encoder == "free"
    started[0][1].close()


def test_the_interface_of_an_address() -> None:
    assert network.interface_of("127.0.0.2") == "lo"
    assert network.interface_of("192.0.2.1") is None  # an address nobody has
    assert network.is_loopback(network.own_address("127.0.0.1"))


def test_a_notice_that_cannot_be_left_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(team: Team, notice: Notice) -> None:
        raise EngineError("the store does not answer")

    monkeypatch.setattr(listener_module, "leave_notice", fail)
    with caplog.at_level(logging.ERROR):
        alone = HostListener(TEAM)
        until(lambda: "the store does not answer" in caplog.text)
    alone.close()
