"""What must not die: the supervisor, whatever is lacking on its side; and what says so when it does not move."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualparal.engine import replica
from dualparal.engine.engine import Engine
from dualparal.engine.pulse import LOADING_SILENCE_S, MIN_TOUCHED_BYTES, Pulse
from dualparal.engine.replica import Replica
from dualparal.errors import EngineError, WorkerDied, WorkerFailed
from dualparal.jobs import ending
from dualparal.messages import Beat, WorkerError
from dualparal.ring.worker import touched_bytes
from tests.engine.test_serving import SECONDS, until, wants
from tests.fake_group import NUM_FRAMES, GroupLog, Make


@contextmanager
def no_files() -> Iterator[None]:
    """No file can be opened meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def failing(number: int, problem: Exception, really: Any) -> Any:
    """Makes groups, after `number` failures."""
    left = [problem] * number

    def make(*given: Any) -> Any:
        if left:
            raise left.pop()
        return really(*given)

    return make


@pytest.mark.parametrize("problem", [OSError(24, "Too many open files"), OSError(30, "Read-only file system"), MemoryError(),
                                     UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")])  # fmt: skip
def test_a_group_that_cannot_be_made_is_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    monkeypatch.setattr(replica, "WorkerGroup", failing(replica.MAX_FAILED_RESTARTS - 1, problem, replica.WorkerGroup))
    with make() as engine:
        assert engine.submit(wants("x")).result(SECONDS).num_frames == NUM_FRAMES
        assert engine.replicas[0].num_restarts == replica.MAX_FAILED_RESTARTS - 1


def test_one_that_never_can_be_made_fails_with_the_reason(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "WorkerGroup", failing(999, OSError(28, "No space left on device"), None))
    engine = make().start(wait=False)
    with pytest.raises(EngineError, match="No space left on device"):
        engine.submit(wants("x")).result(SECONDS)
    until(lambda: engine.state == "failed")
    assert "No space left" in str(engine.error) and engine.stuck is None
    engine.close()


def test_killed_while_no_file_can_be_opened(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        job = engine.submit(wants("slow"))
        until(lambda: len(job.view().blocks) == 2)
        with no_files():
            group_log.groups[-1].kill()
            with pytest.raises(WorkerDied):
                job.result(SECONDS)
        assert engine.submit(wants("after")).result(SECONDS).num_frames == NUM_FRAMES


def test_jobs_end_even_where_ending_them_fails(make: Make, group_log: GroupLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "join_finished", lambda job: 1 / 0)
    with make() as engine:
        with pytest.raises(WorkerDied):
            engine.submit(wants("die")).result(SECONDS)
        assert engine.submit(wants("after")).result(SECONDS).num_frames == NUM_FRAMES


def test_whatever_the_supervisor_meets_its_thread_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    num_left = [3]

    def live(self: Replica) -> None:
        if num_left[0]:
            num_left[0] -= 1
            raise RuntimeError("can't start new thread")
        really(self)

    really = Replica._live
    monkeypatch.setattr(Replica, "_live", live)
    with make() as engine:
        assert engine.submit(wants("x")).result(SECONDS).num_frames == NUM_FRAMES
    assert num_left == [0]


def test_an_outputs_folder_that_is_not_utf_8(tiny: Path, tmp_path: Path, group_log: GroupLog) -> None:
    outputs = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with Engine(tiny, device="cpu", threads=1, outputs=outputs) as engine:
        job = engine.submit(wants("x"))
        assert job.result(SECONDS).num_frames == NUM_FRAMES
    assert job.folder.events()[-1] == job.view().final


def test_a_supervisor_that_does_not_move_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as engine:
        assert engine.stuck is None
        monkeypatch.setattr(replica, "STUCK_S", 0.2)
        go_on = threading.Event()
        monkeypatch.setattr(Replica, "_serve", lambda *_, **__: go_on.wait(SECONDS))
        until(lambda: engine.stuck is not None)
        assert "supervisor of replica 0" in str(engine.stuck)
        go_on.set()
        monkeypatch.undo()
    assert engine.stuck is None


# Which of several errors is told


class Reported:
    """A group whose messages are known beforehand."""

    def __init__(self, *batches: tuple[list[Any], list[str]]) -> None:
        self._batches = list(batches)

    def receive(self, timeout_s: float, also: list[Any]) -> tuple[list[Any], list[str], bool]:
        return (*(self._batches.pop(0) if self._batches else ([], [])), False)

    def was_killed(self, name: str) -> bool:
        return name == "rank 2"

    def describe_end(self, name: str) -> str:
        return f"{name} was killed by SIGKILL"


ECHO = WorkerError("rank 0", "WorkerDied", "rank 1 is gone")


@pytest.mark.parametrize(
    ("batches", "cause"),
    [
        ([([WorkerError("rank 1", "OutOfMemory", "rank 1 ran out of memory")], [])], "rank 1 ran out of memory"),
        ([([WorkerError("rank 3", "WorkerDied", "rank 2 is gone")], []), ([], ["rank 0", "rank 2"])], "rank 2 was killed"),
        ([([], ["rank 0"]), ([WorkerError("rank 1", "WorkerFailed", "rank 1 failed: KeyError")], [])], "KeyError"),
    ],
)
def test_the_root_cause_is_named_not_its_echo(make: Make, batches: list[Any], cause: str) -> None:
    """A rank whose neighbour died says so first; the one that died says why, or is found killed."""
    one = make().replicas[0]
    found = one._root_cause(Reported(*batches), None, ECHO)  # type: ignore[arg-type]
    assert cause in str(found)


def test_jobs_end_with_the_root_cause(make: Make, group_log: GroupLog) -> None:
    with make() as engine:
        job = engine.submit(wants("slow"))
        until(lambda: len(job.view().blocks) == 2)
        group = group_log.groups[-1]
        group.say(ECHO)
        group.say(WorkerError("rank 1", "WorkerFailed", "rank 1 failed: KeyError: 'x'"))
        with pytest.raises(WorkerFailed, match="KeyError"):
            job.result(SECONDS)


# Loading


def test_workers_that_load_have_to_get_on() -> None:
    pulse = Pulse(0.0, timeout_s=600.0)
    now_s, read = 0.0, 0

    def pass_time(seconds: float, bytes_per_s: int) -> None:
        nonlocal now_s, read
        for _ in range(int(seconds)):
            now_s, read = now_s + 1, read + bytes_per_s
            pulse.look(now_s)
            pulse.take(Beat("codec", touched_bytes=read))
            pulse.take(Beat("rank 0", touched_bytes=1000))

    pass_time(3 * LOADING_SILENCE_S, MIN_TOUCHED_BYTES)
    assert pulse.fault(loading={"codec", "rank 0"}) is None, "rank 0 waits for it"
    pass_time(LOADING_SILENCE_S - 1, 100)
    assert pulse.fault(loading={"codec"}) is None
    pass_time(2, 100)
    assert pulse.fault(loading={"codec"}) == f"codec is loading and has read nothing for {LOADING_SILENCE_S:.0f} s"
    assert pulse.fault(loading=()) is None
    pulse.wait_on()
    assert pulse.fault(loading={"codec"}) is None


def test_what_a_process_reads_is_counted(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 2**22)
    before = touched_bytes()
    (tmp_path / "weights").read_bytes()
    after = touched_bytes()
    assert before is not None and after is not None and after - before >= 2**22


# What a platform asks


def test_health_tells_of_what_is_stuck() -> None:
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from dualparal.ui.serve import health_routes

    engine = SimpleNamespace(state="ready", error=None, stuck=None, preset=SimpleNamespace(name="x"))
    client = TestClient(Starlette(routes=health_routes(SimpleNamespace(engine=engine))))  # type: ignore[arg-type]
    assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    engine.stuck = "the supervisor of replica 0 has not moved for 120 s"
    assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [503, 503]
    assert client.get("/healthz").json()["reason"] == engine.stuck
