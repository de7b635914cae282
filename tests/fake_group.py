"""A worker group without processes: the front end's side of the engine at full speed, with deaths on command.

It runs jobs in a thread and sends what real workers send. A job's prompt says what happens: "die" kills a worker halfway, "die
once" only the first time, "slow" waits to be stopped, "stuck" hangs in the codec.
"""

from __future__ import annotations

import functools
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualparal.events import BlockReady, Progress, Started
from dualparal.media.writer import VideoWriter
from dualparal.runtime import replica
from dualparal.runtime.messages import (
    Beat,
    CancelJob,
    Denoised,
    Ready,
    RunJob,
    Shutdown,
    VideoClosed,
    WorkerError,
    WorkerOptions,
)

NUM_BLOCKS = 4


class Notebook:
    """What all groups of a test did."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: list[RunJob] = []
        self.groups: list[FakeGroup] = []
        self.refuses_to_start = 0  # so many groups die before they are ready
        self.start_errors: list[WorkerError] = []  # so many groups end with these before they are ready
        self.dead_replicas: set[str] = set()  # devices of groups that never start
        self.let_go = threading.Event()  # "slow" jobs go on
        self.slow_at = 2  # the block before which they wait
        self.is_deaf = False  # stops are not heard

    def names(self) -> list[str]:
        """Prompts in the order in which their jobs were run."""
        with self.lock:
            return [run.request.prompt for run in self.runs]


class FakeGroup:
    notebook: Notebook

    missing: tuple[str, ...] = ()
    far: tuple[str, ...] = ()

    def __init__(self, options: WorkerOptions, gate: None = None) -> None:
        self.options = options
        self.processes: dict[str, Any] = {"rank 0": None, "codec": None}
        self.requests: queue.Queue[Any] = queue.Queue()
        self._out: queue.Queue[Any] = queue.Queue()
        self._dead: str | None = None
        self._stopped: set[str] = set()
        self.is_closed = False
        with self.notebook.lock:
            self.notebook.groups.append(self)
            cannot = self.notebook.refuses_to_start > 0 or options.codec_device in self.notebook.dead_replicas
            self.notebook.refuses_to_start -= 1
            errors = self.notebook.start_errors
            error = errors.pop(0) if errors and not cannot else None
        if error is not None:
            self._out.put(error)
        elif cannot:
            self._dead = "rank 0"
        else:
            threading.Thread(target=self._work, daemon=True).start()

    def receive(self, timeout_s: float, also: list[Any]) -> tuple[list[Any], list[str], bool]:
        deadline_s = time.monotonic() + min(timeout_s, 0.3)
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

    def share_port(self, message: object) -> None:
        raise AssertionError("there is no ring here")

    def close(self, grace_s: float) -> None:
        self.is_closed = True
        self.requests.put(Shutdown())

    def kill(self) -> None:
        self._dead = "rank 0"

    def _work(self) -> None:
        for name in self.processes:
            self._out.put(Ready(name, {"pid": 0}))
            self._out.put(Beat(name, resident_bytes=2**20))
        while not isinstance(message := self.requests.get(), Shutdown):
            if isinstance(message, RunJob):
                with self.notebook.lock:
                    num_before = sum(run.job_id == message.job_id for run in self.notebook.runs)
                    self.notebook.runs.append(message)
                self._run(message, num_before)
            elif isinstance(message, CancelJob):
                self._stopped.add(message.job_id)

    def _run(self, run: RunJob, num_before: int) -> None:
        prompt, job_id = run.request.prompt, run.job_id
        self._out.put(Started(job_id=job_id, num_blocks=NUM_BLOCKS, num_items=NUM_BLOCKS, num_frames=4 * NUM_BLOCKS))
        num_made = 0
        for block in range(NUM_BLOCKS):
            if self._dead or self.is_closed:
                return
            if "slow" in prompt and block == self.notebook.slow_at:
                while not self.notebook.let_go.wait(0.002) and not self._take_stops(job_id) and not self._dead:
                    if self.is_closed:
                        return
            if ("die" in prompt and block == 2) and not ("once" in prompt and num_before):
                self._dead = "rank 0"
                return
            if self._take_stops(job_id):
                break
            path = Path(run.folder) / f"block_{block:04d}.ts"
            path.write_bytes(b"G" * 188)
            num_made += 1
            self._out.put(Progress(job_id=job_id, items_done=block + 1, num_items=NUM_BLOCKS, num_steps=1, block_steps=(1,)))
            self._out.put(
                BlockReady(job_id=job_id, block=block, path=str(path), first_frame=4 * block, num_frames=4, duration_s=0.25)
            )
        is_stopped = job_id in self._stopped
        self._stopped.discard(job_id)
        self._out.put(Denoised(job_id))
        if "stuck" in prompt:
            self._out.put(Beat("codec", step="decoding block 1", busy_s=self.options.timeout_s + 1))
            return
        video = Path(run.folder) / "video.mp4"
        video.write_bytes(_some_video())
        self._out.put(VideoClosed(job_id, is_stopped, str(video), 4 * num_made, {"denoise_s": 0.5}, None))

    def _take_stops(self, job_id: str) -> bool:
        while not self.requests.empty():
            message = self.requests.get()
            if isinstance(message, CancelJob):
                if not self.notebook.is_deaf:
                    self._stopped.add(message.job_id)
            else:
                self.requests.put(message)
                break
        return job_id in self._stopped


@contextmanager
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """Engines made meanwhile have no processes; yields what they did."""
    notebook = Notebook()
    group = type("FakeGroup", (FakeGroup,), {"notebook": notebook})
    monkeypatch.setattr(replica, "WorkerGroup", group)
    monkeypatch.setattr(replica, "PAUSE_AFTER_FAILED_START_S", 0.01)
    monkeypatch.setattr(replica, "MAX_PAUSE_S", 0.01)
    monkeypatch.setattr("dualparal.runtime.ending.join_finished", _joined)
    monkeypatch.setattr("dualparal.runtime.dispatcher.join_finished", _joined)
    monkeypatch.setattr("dualparal.runtime.replica.join_finished", _joined)
    yield notebook
    notebook.let_go.set()


@functools.cache
def _some_video() -> bytes:
    """Of as many frames as a whole job has."""
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder), width=32, height=32, fps=16)
        writer.add_block(np.zeros((4 * NUM_BLOCKS, 32, 32, 3), np.uint8))
        path = writer.finish("{}")
        assert path is not None
        return path.read_bytes()


def _joined(job: Any) -> tuple[str | None, int]:
    blocks = job.view().blocks
    return (str(job.folder.video), sum(b.num_frames for b in blocks)) if blocks else (None, 0)
