"""A worker group without processes: the engine and the page at full speed, with faults on command.

It speaks the real messages and writes real videos through the codec's writer. Words in a job's prompt say what happens to it:
"slow" waits at `slow_at` finished blocks, "die" kills a worker halfway, "die once" only the first time, "fail" ends the job
halfway, "stuck" hangs in the codec. Everything else that a test can do is in `GroupLog`. Knows no torch.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dualparal.engine import comparer, replica
from dualparal.engine.engine import Engine
from dualparal.messages import (
    Beat,
    CancelJob,
    Denoised,
    Finish,
    JobError,
    Played,
    Ready,
    RunJob,
    Shutdown,
    Steer,
    WorkerError,
    WorkerOptions,
)
from tests.fake_job import JobUnderWay

FOUR_BLOCKS = {"latents_num": 4, "num_per_block": 1, "num_cat": 0, "num_inference_steps": 2, "height": 32, "width": 32}
NUM_BLOCKS, NUM_FRAMES, HALF_THE_FRAMES = 4, 13, 5  # of a request for `FOUR_BLOCKS`
NO_MEMORY = "rank 0 ran out of memory: 812 MiB asked for, 95 MiB free; ask for a smaller num_per_block"
Make = Callable[..., Engine]


class GroupLog:
    """What all groups of a test did, and what they are to do; everything may be changed at any time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: list[RunJob] = []
        self.groups: list[FakeGroup] = []
        self.item_s = 0.0  # of a block step
        self.slow_at: float = 2  # "slow" jobs go no further than so many finished blocks
        self.let_go = threading.Event()  # they go on
        self.can_load = threading.Event()  # until it is set, groups that start do not become ready
        self.can_load.set()
        self.refuses_to_start = 0  # so many groups die before they are ready
        self.start_errors: list[WorkerError] = []  # so many groups end with these before they are ready
        self.dead_replicas: set[str] = set()  # devices of groups that never start
        self.is_deaf = False  # stops are not heard

    def names(self) -> list[str]:
        """Prompts in the order in which their jobs were run."""
        with self.lock:
            return [run.request.prompt for run in self.runs]


class FakeGroup:
    """In place of `WorkerGroup`: a thread for rank 0 and the codec, words for the other ranks."""

    notebook: GroupLog
    names: tuple[str, ...] = ()  # other workers than an engine's

    missing: tuple[str, ...] = ()
    far: tuple[str, ...] = ()

    def __init__(self, options: WorkerOptions, listener: None = None) -> None:
        self.options = options
        self.processes: dict[str, Any] = dict.fromkeys(self.names or [f"rank {r}" for r in range(options.ranks)] + ["codec"])
        self.requests: queue.Queue[Any] = queue.Queue()
        self._out: queue.Queue[Any] = queue.Queue()
        self._dead: str | None = None
        self._stopped: set[str] = set()
        self.wishes: deque[Steer | Finish] = deque()  # that have come, answered before the next step
        self._beats_at_s: float | None = None  # None: it is loading
        self.is_closed = False
        with self.notebook.lock:
            self.notebook.groups.append(self)
            cannot = self.notebook.refuses_to_start > 0 or options.codec_device in self.notebook.dead_replicas
            self.notebook.refuses_to_start -= 1
            errors = self.notebook.start_errors
            error = errors.pop(0) if errors and not cannot else None
        if error is not None:
            self.say(error)
        elif cannot:
            self.kill()
        else:
            threading.Thread(target=self._work, daemon=True).start()

    # For the replica

    def receive(self, timeout_s: float, also: list[Any]) -> tuple[list[Any], list[str], bool]:
        deadline_s = time.monotonic() + min(timeout_s, 0.3)
        if self._beats_at_s is not None and time.monotonic() > self._beats_at_s:
            self._beat()
        while time.monotonic() < deadline_s:
            found, dead = [], self._dead  # looked at first: a dead worker's last messages come before its name
            while not self._out.empty():
                found.append(self._out.get())
            is_woken = bool(also) and also[0].poll()
            if found or is_woken or dead:
                return found, [dead] if dead else [], is_woken
            time.sleep(0.002)
        return [], [], False

    def describe_end(self, name: str) -> str:
        return f"{name} was killed by SIGKILL (out of memory, or killed by hand)"

    def was_killed(self, name: str) -> bool:
        return name == self._dead

    def share_port(self, message: object) -> None:
        raise AssertionError("there is no ring here")

    def close(self, grace_s: float) -> None:
        self.is_closed = True
        self.requests.put(Shutdown())

    # For tests

    def kill(self) -> None:
        """As if the first worker had been killed."""
        self._dead = next(iter(self.processes))

    def say(self, message: object) -> None:
        """Send a message to the front end."""
        self._out.put(message)

    # The workers

    def _work(self) -> None:
        while not self.notebook.can_load.wait(0.01):
            if self._is_gone():
                return
        for name in self.processes:
            self.say(Ready(name, {"pid": 0}))
        self._beat()
        while not isinstance(message := self.requests.get(), Shutdown):
            if isinstance(message, RunJob):  # a stop that comes too late is not for the next run of that job
                with self.notebook.lock:
                    is_first = all(run.job_id != message.job_id for run in self.notebook.runs)
                    self.notebook.runs.append(message)
                self._run(message, is_first)
                self._stopped.discard(message.job_id)

    def _beat(self) -> None:
        self._beats_at_s = time.monotonic() + 1.0
        for name in self.processes:
            self.say(Beat(name, resident_bytes=2**20))

    def _is_gone(self) -> bool:
        return self._dead is not None or self.is_closed

    def _run(self, run: RunJob, is_first: bool) -> None:
        """One job from its prompt to its video. Whatever the disk refuses ends the job alone, as in the codec."""
        try:
            job = JobUnderWay(run, self.options.ranks, self.say)
            is_stopped = False
            for place in itertools.count():
                is_stopped = self._is_stopped(run.job_id)
                while self.wishes:
                    self._steer(job, self.wishes.popleft(), place)
                if place < len(job.items):
                    job.look_ahead(job.items[place])
                if place == len(job.items):
                    break
                item = job.items[place]
                if run.rest_at and job.first_steps >= run.rest_at and item.block == 0:
                    is_stopped = True
                if is_stopped or self._is_gone():
                    break
                if job.step(item, self.notebook.item_s):
                    job.add_block(item.block)
                    self._meet_fate(job, is_first)
                    if self._is_gone() or job.has_failed:
                        break
            if self._is_gone():
                return
            self.say(Denoised(run.job_id))
            if "stuck" in run.request.prompt:
                self.say(Beat("codec", step="decoding block 1", busy_s=self.options.engine.timeout_s + 1))
            elif not job.has_failed:
                self.say(job.close(is_stopped))
        except (OSError, ValueError) as error:
            self.say(JobError(run.job_id, "OutputError", str(error)))
            self.say(Denoised(run.job_id))

    def _steer(self, job: JobUnderWay, wish: Steer | Finish, place: int) -> None:
        (job.wrap_up if isinstance(wish, Finish) else job.steer)(wish, place)  # type: ignore[operator]

    def _meet_fate(self, job: JobUnderWay, is_first: bool) -> None:
        """After a block: what the prompt says."""
        prompt, notebook = job.run.request.prompt, self.notebook
        while "slow" in prompt and job.num_made >= notebook.slow_at and not notebook.let_go.wait(0.002):
            if self._is_gone() or self._is_stopped(job.run.job_id):
                return
        if job.num_made != (job.plan.num_blocks + 1) // 2:
            return
        if "die" in prompt and (is_first or "once" not in prompt):
            self.kill()
        elif "fail" in prompt:
            job.has_failed = True
            self.say(JobError(job.run.job_id, "OutOfMemory", NO_MEMORY))

    def _is_stopped(self, job_id: str) -> bool:
        while not self.requests.empty():
            message = self.requests.get()
            if isinstance(message, CancelJob):
                if not self.notebook.is_deaf:
                    self._stopped.add(message.job_id)
            elif isinstance(message, Steer | Finish):
                self.wishes.append(message)
            elif not isinstance(message, Played):
                self.requests.put(message)
                break
        return job_id in self._stopped


@contextmanager
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupLog]:
    """Engines made meanwhile have no processes; yields what they did."""
    notebook = GroupLog()
    group = type("FakeGroup", (FakeGroup,), {"notebook": notebook})
    monkeypatch.setattr(replica, "WorkerGroup", group)
    monkeypatch.setattr(comparer, "BaselineGroup", type("FakeBaselineGroup", (group,), {"names": ("baseline",)}))
    monkeypatch.setattr(replica, "PAUSE_AFTER_FAILED_START_S", 0.01)
    monkeypatch.setattr(replica, "MAX_PAUSE_S", 0.01)
    yield notebook
    notebook.let_go.set()
