"""The engine: a queue of jobs in front of one group of worker processes, and the thread that watches over them.

Lives in the front end, never imports torch, and survives any worker's death: the job at work fails with the named cause, the
group is started anew, queued jobs go on.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dualparal.core.job_plan import JobPlan, Placement, plan_job
from dualparal.core.rules import settle_rules
from dualparal.core.sizes import DiTSizes
from dualparal.errors import DualParalError, EngineError, OutputError, QueueFull, RequestError, WorkerDied, error_from_wire
from dualparal.events import BlockReady, Cancelled, Event, Finished, Progress, Queued
from dualparal.media.writer import Segment, VideoWriter
from dualparal.model.known import sizes_of
from dualparal.model.layout import split_layers
from dualparal.model.lora_source import find_loras
from dualparal.model.source import find_model
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.runtime.calibration import cache_folder, load_speed
from dualparal.runtime.devices import bytes_per_device, place
from dualparal.runtime.engine_options import check_text_encoder, dtype_name
from dualparal.runtime.job import Job
from dualparal.runtime.journal import STATE_FOLDER, JobFolder, find_job, new_job_id, outputs_folder
from dualparal.runtime.launch import WorkerGroup
from dualparal.runtime.messages import (
    Beat,
    CancelJob,
    Denoised,
    JobError,
    Ready,
    RunJob,
    Spans,
    StorePort,
    VideoClosed,
    WorkerError,
    WorkerOptions,
)
from dualparal.runtime.tensors import checked_noise, checked_text

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
SILENCE_S = 60.0  # a worker that sends no heartbeat for so long hangs
START_TIMEOUT_S = 1800.0  # loading 14B weights from a slow disk takes minutes
CLOSE_GRACE_S = 10.0
MAX_FAILED_STARTS = 3
CHANGES = ("loras", "attention", "compile", "vae_dtype")  # of a job's record; what the engine was told that changes numbers


class Engine:
    """Makes videos with one model on `ranks` processes. Use it as a context manager, or `start` and `close` it."""

    def __init__(
        self,
        model: str | Path = "pocket",
        *,
        ranks: int = 1,
        device: str = "auto",
        dtype: str | None = None,
        layer_split: Sequence[int] | None = None,
        preset: Preset | None = None,
        threads: int | None = None,
        outputs: str | Path | None = None,
        max_queue: int = 32,
        timeout_s: float = 600.0,
        verbose: bool = False,
        worker_hook: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        vae_dtype: str | None = None,
        text_encoder: str = "keep",
        loras: Sequence[str] = (),
    ) -> None:
        """Check everything that can be checked without loading a weight; start nothing.

        `model` is a preset's name, a folder in diffusers' layout, or a hub id; `device` auto, cpu or cuda; `dtype` of the DiT
        (default: float32 on the CPU, the preset's on GPUs); `layer_split` layers per rank (default: even); `threads` CPU
        threads per process (default: the cores shared out; equal bits on different numbers of ranks need equal threads);
        `timeout_s` is the longest wait for another rank within a job; `attention` a backend of diffusers' dispatcher (native,
        flash, sage, ...); `compile` runs layers through torch.compile; `vae_dtype` of the VAE (default: the preset's);
        `text_encoder` keep, free or cpu: where it is after encoding; `loras` "file, folder or hub id[:scale]". The last ones
        but `text_encoder` change the numbers. Raises `RequestError`, `PresetError`, `CheckpointError`.
        """
        self.preset, self.checkpoint = find_model(str(model), preset)
        self.num_experts = self.checkpoint.num_experts
        self.ranks = ranks
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise RequestError(f"ranks={ranks!r} is not a number of processes; use 1 or more", "ranks")
        layers = split_layers(self.checkpoint.num_layers, ranks, layer_split)
        devices, codec_device = place(device, ranks)
        name = dtype_name(dtype, "float32" if devices[0] == "cpu" else self.preset.dtype, "dtype")
        vae_dtype = dtype_name(vae_dtype, self.preset.vae_dtype, "vae_dtype")
        if threads is not None and threads < 1:
            raise RequestError(f"threads={threads} is not a number of threads; use 1 or more", "threads")
        self.outputs = outputs_folder(outputs)
        self.error: str | None = None
        self.workers: dict[str, dict[str, Any]] = {}  # what each worker said when it was ready
        self._max_queue = max_queue
        self._options = WorkerOptions(
            folder=str(self.checkpoint.folder), layers=layers, devices=devices, codec_device=codec_device,
            dtype=name, threads=threads or max(1, (os.cpu_count() or 1) // ranks), timeout_s=timeout_s,
            verbose=verbose, worker_hook=worker_hook, attention=attention, is_compiled=compile, vae_dtype=vae_dtype,
            text_encoder=check_text_encoder(text_encoder), text_cache=str(cache_folder() / "text"),
            loras=find_loras(loras, self.num_experts),
        )  # fmt: skip
        self._sizes = sizes_of(self.checkpoint)
        self._placement = Placement(
            layers=tuple(len(stage) for stage in layers), dtype=name, vae_dtype=vae_dtype, text_encoder=text_encoder,
            codec_rank=devices.index(codec_device) if devices[0] != "cpu" and codec_device in devices else None,
            on_gpu=devices[0] != "cpu", bytes_per_device=bytes_per_device(devices[0].partition(":")[0]),
        )  # fmt: skip
        self._state = "closed"
        self._changed = threading.Condition(threading.RLock())
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._at_rank_0: Job | None = None
        self._decoding: dict[str, Job] = {}  # left rank 0, not yet closed by the codec
        self._to_cancel: deque[Job] = deque()
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._supervisor: threading.Thread | None = None
        self._is_closing = False

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or closed."""
        return self._state

    @property
    def dtype(self) -> str:
        return self._options.dtype

    # Life

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, wait: bool = True) -> Engine:
        """Start the workers; with `wait`, return when they are ready or raise what stopped them."""
        with self._changed:
            if self._supervisor is not None:
                raise EngineError("this engine has been started before; make a new one")
            self._state = "starting"
            self._supervisor = threading.Thread(target=self._supervise, name="dualparal supervisor", daemon=True)
            self._supervisor.start()
            _close_at_exit(self)
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until the workers can take a job; raises what stopped them, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state in ("ready", "failed", "closed"), timeout):
                raise TimeoutError(f"the engine was not ready within {timeout} s")
            if self._state != "ready":
                raise self._failure()

    def close(self) -> None:
        """Stop what runs and end every process. Jobs that have not ended fail with `EngineError`. May be called twice."""
        with self._changed:
            self._is_closing = True
            supervisor = self._supervisor
        self._wake()
        if supervisor is not None and supervisor is not threading.current_thread():
            supervisor.join()
        self._state = "closed"

    # Jobs

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """`request` with every field filled, checked against the preset's limits; raises `RequestError`."""
        resolved = request.resolve(self.preset, num_experts=self.num_experts, boundary_ratio=self.checkpoint.boundary_ratio)
        return settle_rules(resolved, self.ranks)

    def plan(self, request: GenerationRequest, *, is_short: bool = False) -> JobPlan:
        """What `request` needs of this engine's devices: bytes, and times once `plan --calibrate` has been run on them.

        `is_short` leaves the times out and is quick for any length. `.refusal` is what `submit` would say.
        """
        device = "cuda" if self._placement.on_gpu else "cpu"
        speed = load_speed(device, self.dtype, DiTSizes.of(self._sizes.config).dim)
        return plan_job(self.resolve(request), self._sizes, self._placement, speed=speed, is_short=is_short)

    def submit(
        self,
        request: GenerationRequest,
        *,
        owner: str = "",
        latents: Sequence[torch.Tensor] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        return_latents: bool = False,
        export_images: bool = False,
        job_id: str | None = None,
    ) -> Job:
        """Queue a request and return at once.

        `latents`: initial noise per block, each [1, C, F, h, w]; `prompt_embeds`, `negative_prompt_embeds`: [1, tokens, text
        dim], used as they are. Raises `RequestError`, `QueueFull`, `OutputError`, or `EngineError` when closed or failed.
        """
        resolved = self.resolve(request)
        if (refusal := self.plan(resolved, is_short=True).refusal) is not None:
            raise RequestError(refusal, "num_per_block")
        noise = checked_noise(latents, resolved, self.checkpoint)
        cond = checked_text(prompt_embeds, "prompt_embeds", self.checkpoint)
        uncond = checked_text(negative_prompt_embeds, "negative_prompt_embeds", self.checkpoint)
        job_id = new_job_id() if job_id is None else job_id
        with self._changed:
            if self._state in ("failed", "closed") or self._is_closing:
                raise self._failure()
            if len(self._queue) >= self._max_queue:
                raise QueueFull(f"{len(self._queue)} jobs are waiting, the most there may be; try again later")
            folder = JobFolder.create(
                self.outputs, job_id, resolved, model=str(self.checkpoint.folder), preset=self.preset.name,
                owner=owner, ranks=self.ranks, dtype=self.dtype, threads=self._options.threads, export_images=export_images,
                has_tensors=any(x is not None for x in (latents, prompt_embeds, negative_prompt_embeds)), **self._changes(),
            )  # fmt: skip
            run = RunJob(folder.job_id, resolved, str(folder.path), return_latents, export_images, noise, cond, uncond)
            job = Job(run, folder, owner, self._request_cancel)
            self._enqueue(job)
        self._wake()
        return job

    def _changes(self) -> dict[str, Any]:
        """Options that change the numbers, as a job's record keeps them; empty for the model as it is."""
        options = self._options
        changes: dict[str, Any] = {}
        if options.loras:
            changes["loras"] = [lora.label for lora in options.loras]
        for name, value, plain in (
            ("attention", options.attention, None), ("compile", options.is_compiled, False),
            ("vae_dtype", options.vae_dtype, "float32"),
        ):  # fmt: skip
            if value != plain:
                changes[name] = value
        return changes

    def _enqueue(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._queue.append(job)
        job.emit(Queued(job_id=job.id, position=len(self._queue) - 1 + (self._at_rank_0 is not None)))

    def resume(self, job_id: str, *, return_latents: bool = False) -> Job:
        """Queue a job of this outputs folder again that was interrupted, stopped or failed; it goes on from its last saved
        sweep and gives the bits it would have given. Raises `RequestError` when there is nothing to resume."""
        folder = find_job(self.outputs, job_id)
        with self._changed:
            if self._state in ("failed", "closed") or self._is_closing:
                raise self._failure()
            known = self._jobs.get(job_id)
            if known is not None and not known.has_ended:
                raise RequestError(f"job {job_id} has not ended; there is nothing to resume", "job_id")
            if isinstance(folder.final_event(), Finished):
                raise RequestError(f"job {job_id} has finished; its video is {folder.video}", "job_id")
            record = folder.record()
            if record.get("model") != str(self.checkpoint.folder) or record.get("dtype") != self.dtype:
                raise RequestError(
                    f"job {job_id} was made with {record.get('model')} in {record.get('dtype')}; this engine runs "
                    f"{self.checkpoint.folder} in {self.dtype}",
                    "job_id",
                )
            if (made_with := {key: record[key] for key in CHANGES if key in record}) != self._changes():
                raise RequestError(f"job {job_id} was made with {made_with}, this engine runs {self._changes()}", "job_id")
            if record.get("has_tensors"):
                raise RequestError(f"job {job_id} was given tensors, which are not kept; submit it again", "job_id")
            if record.get("threads") != self._options.threads:
                log.warning("job %s was begun with %s threads per process; bits may differ", job_id, record.get("threads"))
            run = RunJob(
                job_id, folder.request(), str(folder.path), return_latents, bool(record.get("export_images")), is_resumed=True
            )
            job = Job(run, folder, str(record.get("owner", "")), self._request_cancel)
            for event in folder.events():
                if isinstance(event, BlockReady):
                    job.emit(event, is_stored=False)
            self._enqueue(job)
        self._wake()
        return job

    def job(self, job_id: str) -> Job | None:
        """A job of this run by id; older ones are on disk (`journal.find_job`)."""
        return self._jobs.get(job_id)

    def jobs(self) -> list[Job]:
        """Jobs that have not ended: those at work first, then the queue in order."""
        with self._changed:
            at_work = [*self._decoding.values(), *([self._at_rank_0] if self._at_rank_0 else [])]
            return [job for job in (*at_work, *self._queue) if not job.has_ended]

    def forget(self, job_id: str) -> None:
        """Drop an ended job from memory (its files stay)."""
        with self._changed:
            if (job := self._jobs.get(job_id)) and job.has_ended:
                del self._jobs[job_id]

    def _request_cancel(self, job: Job) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                job.emit(Cancelled(job_id=job.id))
                self._tell_positions()
                return
            self._to_cancel.append(job)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_writer.send_bytes(b"x")

    def _failure(self) -> DualParalError:
        if self._error is not None:
            return self._error
        return EngineError("the engine is closed; start a new one")

    _error: DualParalError | None = None

    # The supervisor's thread

    def _supervise(self) -> None:
        failed_starts = 0
        while not self._is_closing:
            was_ready, error = self._run_group()
            failed_starts = 0 if was_ready else failed_starts + 1
            if self._is_closing or error is None:
                break
            log.warning("workers ended: %s", error)
            # A checkpoint that cannot be loaded will not load the next time either.
            if (not isinstance(error, WorkerDied) and not was_ready) or failed_starts >= MAX_FAILED_STARTS:
                self._give_up(error)
                return
            self._set_state("restarting", str(error))
        self._end_all(EngineError("the engine was closed before the job was done"), is_stored=False)
        self._set_state("closed")

    def _run_group(self) -> tuple[bool, DualParalError | None]:
        """One generation of workers, from start to end: (whether it was ever ready, what ended it)."""
        group = WorkerGroup(self._options)
        error: DualParalError | None = None
        waiting_for = set(group.processes)
        self.workers = {}
        seen_s: dict[str, float] = {}  # from the first beat on: importing torch from a cold disk may take minutes
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            while error is None and not self._is_closing:
                messages, ended, is_woken = group.receive(1.0, [self._wake_reader])
                if is_woken:
                    self._wake_reader.recv_bytes()
                now_s = time.monotonic()
                for message in messages:
                    match message:
                        case Beat():
                            seen_s[message.name] = now_s
                        case StorePort():
                            group.share_port(message)
                        case Ready():
                            self.workers[message.name] = message.about
                            waiting_for.discard(message.name)
                            if not waiting_for:
                                self._set_state("ready")
                        case WorkerError():
                            error = self._root_cause(group, error, message)
                        case _:
                            self._take(message, group)
                if ended and error is None:
                    error = WorkerDied(f"{group.describe_end(ended[0])}")
                silent = [name for name, at_s in seen_s.items() if now_s - at_s > SILENCE_S]
                # When all are silent it was this process that slept.
                if silent and error is None and now_s - max(seen_s.values()) < SILENCE_S / 2:
                    error = WorkerDied(f"{silent[0]} has not answered for {SILENCE_S:.0f} s")
                if waiting_for and now_s > deadline_s:
                    error = WorkerDied(f"{min(waiting_for)} was not ready within {START_TIMEOUT_S:.0f} s")
                if not waiting_for and error is None:
                    self._dispatch(group)
        finally:
            is_clean = error is None and not waiting_for
            group.close(CLOSE_GRACE_S if is_clean else 0.0)
            if error is not None:
                self._end_at_work(error)
        return not waiting_for, error

    def _root_cause(self, group: WorkerGroup, error: DualParalError | None, message: WorkerError) -> DualParalError:
        """The cause, not its echo: a rank whose neighbour died reports that too, often first."""
        found = error_from_wire(message.kind, message.message)
        if not isinstance(found, WorkerDied):
            return found
        deadline_s = time.monotonic() + 2.0
        while time.monotonic() < deadline_s:
            messages, ended, _ = group.receive(0.2, [])
            for other in messages:
                if not isinstance(other, WorkerError):
                    self._take(other, group)  # a block or a video may have been finished meanwhile
                elif other.kind != "WorkerDied":
                    return error_from_wire(other.kind, other.message)
            for name in ended:
                if name != message.name and (group.processes[name].exitcode or 0) < 0:
                    return WorkerDied(group.describe_end(name))
            if ended:
                time.sleep(0.05)  # an ended process stays ready to be waited for
        return error or found

    def _dispatch(self, group: WorkerGroup) -> None:
        """Give rank 0 its next job and pass on cancellations."""
        with self._changed:
            while self._to_cancel:
                job = self._to_cancel.popleft()
                if job is self._at_rank_0:
                    group.requests.put(CancelJob(job.id))
            if self._at_rank_0 is None and self._queue:
                self._at_rank_0 = self._queue.popleft()
                group.requests.put(self._at_rank_0.run)
                self._tell_positions()

    def _tell_positions(self) -> None:
        ahead = int(self._at_rank_0 is not None)
        for position, job in enumerate(self._queue):
            job.emit(Queued(job_id=job.id, position=position + ahead), is_stored=False)

    def _take(self, message: object, group: WorkerGroup) -> None:
        job = self._jobs.get(getattr(message, "job_id", ""))
        if job is None:
            return
        match message:
            case Progress():
                job.emit(_with_busy(message, job.busy(self.ranks)))
            case Event():
                job.emit(message)
            case Spans():
                job.add_spans(message.spans)
            case Denoised():
                with self._changed:
                    self._at_rank_0 = None
                    if not job.has_ended:
                        self._decoding[job.id] = job
            case VideoClosed():
                self._decoding.pop(job.id, None)
                job.keep_latents(message.latents)
                if not message.is_cancelled:
                    shutil.rmtree(job.folder.path / STATE_FOLDER, ignore_errors=True)
                job.emit(self._final_event(job, message))
            case JobError():
                self._decoding.pop(job.id, None)
                if job is self._at_rank_0:
                    group.requests.put(CancelJob(job.id))
                self._end_with_what_is_there(job, error_from_wire(message.kind, message.message))

    @staticmethod
    def _final_event(job: Job, message: VideoClosed) -> Event:
        if message.is_cancelled:
            return Cancelled(job_id=job.id, path=message.path, num_frames=message.num_frames)
        timings = {**message.timings, "total_s": job.seconds_since_submit()}
        if job.first_frames_s is not None:
            timings["first_frames_s"] = job.first_frames_s
        assert message.path is not None
        return Finished(job_id=job.id, path=message.path, num_frames=message.num_frames, timings=timings)

    def _end_at_work(self, error: DualParalError) -> None:
        with self._changed:
            at_work = [*self._decoding.values(), *([self._at_rank_0] if self._at_rank_0 else [])]
            self._at_rank_0 = None
            self._decoding.clear()
        for job in at_work:
            self._end_with_what_is_there(job, error)

    @staticmethod
    def _end_with_what_is_there(job: Job, error: DualParalError) -> None:
        """Fail a job, its finished blocks joined into a playable mp4."""
        path, num_frames = None, 0
        blocks: list[BlockReady] = list(job.view().blocks)
        if blocks and not job.has_ended:
            request = job.request
            assert request.fps and request.height and request.width
            segments = [Segment(Path(b.path), b.first_frame, b.num_frames, b.duration_s) for b in blocks]
            try:
                writer = VideoWriter(
                    job.folder.path, width=request.width, height=request.height, fps=request.fps, segments=segments
                )
                path = str(writer.finish(request.to_json()))
                num_frames = sum(block.num_frames for block in blocks)
            except OutputError as failure:
                log.error("job %s: the finished blocks could not be joined: %s", job.id, failure)
        job.fail(error, path=path, num_frames=num_frames)  # type: ignore[arg-type]

    def _give_up(self, error: DualParalError) -> None:
        self._error = error
        self._end_all(error, is_stored=True)
        self._set_state("failed", str(error))

    def _end_all(self, error: DualParalError, *, is_stored: bool) -> None:
        with self._changed:
            open_jobs = self.jobs()
            self._queue.clear()
            self._at_rank_0 = None
            self._decoding.clear()
        for job in open_jobs:
            job.fail(error, is_stored=is_stored)  # type: ignore[arg-type]

    def _set_state(self, state: str, error: str | None = None) -> None:
        with self._changed:
            self._state, self.error = state, error
            self._changed.notify_all()


def _with_busy(progress: Progress, busy: tuple[float, ...]) -> Progress:
    return dataclasses.replace(progress, busy=busy)


def _close_at_exit(engine: Engine) -> None:
    """An engine that was never closed is closed when the interpreter ends."""
    known = weakref.ref(engine)

    def close() -> None:
        if (found := known()) is not None:
            found.close()

    atexit.register(close)
