"""Plain Wan for comparison, from the engine's side: `dualparal.baseline` in a process of its own, one job after another.

A comparison waits until none of the engine's own jobs is at work; those submitted later do not wait for it. It holds the whole
model once more: on a GPU it needs room beside the first rank. Its jobs are ordinary `Job`s, whose events the process writes to
their folder and tells here line by line. Needs no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.errors import RequestError, WorkerDied
from dualparal.events import Cancelled, event_from_json
from dualparal.request import GenerationRequest
from dualparal.runtime.claim import claim
from dualparal.runtime.job import Job
from dualparal.runtime.journal import JobFolder
from dualparal.runtime.messages import RunJob

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine

CHANGES_OF_LAYERS = {"loras", "attention", "compile", "quantization"}
LOOK_EVERY_S = 0.3
GRACE_S = 5.0


def check_plain(changes: Mapping[str, Any]) -> None:
    """Raise `RequestError` when an engine with these `changes` cannot be compared with diffusers as it is."""
    if changes.keys() & CHANGES_OF_LAYERS:
        raise RequestError(
            "the baseline is diffusers as it is; leave --lora, --attention, --compile and --quantization out", "baseline"
        )


def make_baseline_folder(engine: Engine, request: GenerationRequest, job_id: str, **about: Any) -> JobFolder:
    """The folder of a resolved request that plain Wan is to make with the model and dtypes of `engine`."""
    changes = engine.changes()
    check_plain(changes)
    return JobFolder.create(
        engine.outputs, job_id, request, model=str(engine.checkpoint.folder), preset=engine.preset.name, ranks=1,
        dtype=engine.dtype, threads=engine.threads, baseline="wan", **changes, **about,
    )  # fmt: skip


def baseline_command(folder: Path, device: str, text_encoder: str) -> list[str]:
    """What starts the process that makes the video of a job folder."""
    module = [sys.executable, "-m", "dualparal.baseline"]
    return [*module, str(folder), "--device", device, "--text_encoder", text_encoder]


class BaselineLane:
    """Comparisons that wait and the one that runs. Thread-safe."""

    def __init__(self, device: str, text_encoder: str, is_idle: Callable[[], bool]) -> None:
        """`is_idle` says whether a comparison may start."""
        self._device, self._text_encoder, self._is_idle = device, text_encoder, is_idle
        self._lock = threading.RLock()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, Job] = {}
        self._is_closing = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, folder: JobFolder, owner: str) -> Job:
        """Queue the job of a folder just made."""
        run = RunJob(folder.job_id, folder.request(), str(folder.path))
        job = Job(run, folder, owner, self._cancel, claim=claim(folder))
        with self._lock:
            self._waiting.append(job)
            self._known[job.id] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dualparal baseline", daemon=True)
                self._thread.start()
        return job

    def get(self, job_id: str) -> Job | None:
        return self._known.get(job_id)

    def jobs(self) -> list[Job]:
        """Those that have not ended."""
        with self._lock:
            return [job for job in (self._running, *self._waiting) if job is not None and not job.has_ended]

    def close(self) -> None:
        """End what runs; on disk it and what waits count as cut off."""
        self._is_closing.set()
        self._end_process()
        if self._thread is not None:
            self._thread.join()

    def _cancel(self, job: Job) -> None:
        with self._lock:
            job.is_stopping = True
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is self._running:
                self._end_process()
        job.emit(Cancelled(job_id=job.id))

    def _work(self) -> None:
        while not self._is_closing.wait(LOOK_EVERY_S):
            with self._lock:
                job = self._running = self._waiting.popleft() if self._waiting and self._is_idle() else None
            if job is not None:
                self._run(job)

    def _run(self, job: Job) -> None:
        command = [*baseline_command(job.folder.path, self._device, self._text_encoder), "--tell"]
        with self._lock:
            if job.has_ended or self._is_closing.is_set():
                return
            process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    job.emit(event_from_json(json.loads(line)), is_stored=False)
        with self._lock:
            self._process = self._running = None
        if not job.has_ended and not self._is_closing.is_set():
            job.fail(WorkerDied(f"the baseline ended with exit code {process.returncode}"))

    def _end_process(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
