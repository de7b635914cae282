"""Plain Wan for comparison, from the engine's side: `dualparal.baseline` in a process of its own, one job after another.

A comparison waits until none of the engine's own jobs is at work; those submitted later do not wait for it. It holds the whole
model once more: on a GPU it needs room beside the first rank. Its jobs are ordinary `Job`s, whose events the process writes to
their folder and tells here line by line. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.core.estimate import gigabytes
from dualparal.core.job_plan import JobPlan, plan_job
from dualparal.core.placement import ModelSizes
from dualparal.errors import EngineError, RequestError, WorkerDied, WorkerFailed
from dualparal.events import Cancelled, Event, event_from_json
from dualparal.request import GenerationRequest
from dualparal.runtime.claim import claim, create_job
from dualparal.runtime.job import Job
from dualparal.runtime.journal import JobFolder
from dualparal.runtime.messages import RunJob

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine

log = logging.getLogger(__name__)
CHANGES_OF_LAYERS = {"loras", "attention", "compile", "quantization"}
LOOK_EVERY_S = 0.3
GRACE_S = 5.0
SILENCE_S = 3600.0  # one step over all of a long video, or the decoding of it, takes tens of minutes


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
    return create_job(
        engine.outputs, job_id, request, model=str(engine.checkpoint.folder), preset=engine.preset.name, ranks=1,
        dtype=engine.dtype, threads=engine.threads, baseline="wan", **changes, **about,
    )  # fmt: skip


def baseline_command(folder: Path, device: str, text_encoder: str) -> list[str]:
    """What starts the process that makes the video of a job folder."""
    module = [sys.executable, "-m", "dualparal.baseline"]
    return [*module, str(folder), "--device", device, "--text_encoder", text_encoder]


def check_fits(plan: JobPlan, sizes: ModelSizes, *, num_replicas: int = 1) -> None:
    """Raise `RequestError` when plain Wan has no room for the request of `plan` beside the engine's own work, which may begin
    at any time: the whole model on one device, the whole video as one block."""
    request, placement = plan.request, plan.placement
    whole = request.model_copy(
        update={
            "num_per_block": request.latents_num, "num_cat": 0, "schedule": "paper", "context": "recomputed",
            "max_in_flight": None, "stagger": None, "micro_batches": False,
        }
    )  # fmt: skip
    alone = replace(placement, layers=(sum(placement.layers),), codec_rank=0, is_offloaded=False, is_cache_offloaded=False)
    needed, have = plan_job(whole, sizes, alone, is_short=True).bytes_per_rank, placement.bytes_per_device
    held = plan.memory.ranks[0].total if placement.on_gpu else plan.bytes_in_all * num_replicas
    if have is not None and needed + held > have:
        raise RequestError(
            f"plain Wan makes the whole video at once and needs {gigabytes(needed)} beside the engine's {gigabytes(held)}; "
            f"there are {gigabytes(have)}: compare a shorter video or a smaller picture",
            "latents_num",
        )


class BaselineLane:
    """Comparisons that wait and the one that runs. Thread-safe."""

    def __init__(
        self, device: str, text_encoder: str, is_idle: Callable[[], bool], on_end: Callable[[Job], None] = lambda _: None
    ) -> None:
        """`is_idle` says whether a comparison may start; `on_end` is told of each that has ended."""
        self._device, self._text_encoder, self._is_idle, self._on_end = device, text_encoder, is_idle, on_end
        self._lock = threading.RLock()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, folder: JobFolder, owner: str) -> Job:
        """Queue the job of a folder just made."""
        run = RunJob(folder.job_id, folder.request(), str(folder.path))
        job = Job(run, folder, owner, self._cancel, on_end=self._on_end, claim=claim(folder))
        with self._lock:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dualparal baseline", daemon=True)
                self._thread.start()
        return job

    def jobs(self) -> list[Job]:
        """Those that have not ended."""
        with self._lock:
            return [job for job in (self._running, *self._waiting) if job is not None and not job.has_ended]

    def close(self) -> None:
        """End what runs; on disk it and what waits count as cut off."""
        self._is_closing.set()
        cut_off = self.jobs()
        self._end_process()
        if self._thread is not None:
            self._thread.join()
        for job in cut_off:
            job.fail(EngineError("the engine was closed before the comparison was done"), is_stored=False)

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
            if job is None:
                continue
            try:
                self._run(job)
            except WorkerDied as error:
                job.fail(error)
            except Exception as error:  # no comparison may keep the later ones from running
                log.exception("comparison %s failed", job.id, extra={"job_id": job.id})
                job.fail(WorkerFailed(f"the comparison failed: {type(error).__name__}: {error}"))
            finally:
                self._end_process()
                with self._lock:
                    process, self._process, self._running = self._process, None, None
                if process is not None and process.stdin is not None and process.stdout is not None:
                    process.stdin.close()
                    process.stdout.close()

    def _run(self, job: Job) -> None:
        command = [*baseline_command(job.folder.path, self._device, self._text_encoder), "--tell", "--with_stdin"]
        with self._lock:
            if job.has_ended or self._is_closing.is_set():
                return
            process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno()):
            if (event := _event(line)) is not None:
                job.emit(event, is_stored=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        if not job.has_ended and not job.is_stopping and not self._is_closing.is_set():
            raise WorkerDied(f"the baseline ended with exit code {process.poll()}")

    def _end_process(self) -> None:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                return
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _lines(descriptor: int) -> Iterator[bytes]:
    """What comes line by line until the other side closes it. Raises `WorkerDied` when nothing does for too long."""
    rest = b""
    while wait([descriptor], SILENCE_S):
        if not (chunk := os.read(descriptor, 2**16)):
            return
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    raise WorkerDied(f"the baseline has told nothing for {SILENCE_S:.0f} s")


def _event(line: bytes) -> Event | None:
    """The event of a line; None for what a library has written there."""
    try:
        return event_from_json(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        log.debug("the baseline says: %r", line[:200])
        return None
