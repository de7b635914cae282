"""A stand-in for the engine: the same interface, no model, no worker process, seconds instead of minutes.

Jobs go through the same states, write the same files (real, playable segments and mp4) and can be slow, fail or "die", so
that the page and the API can be tried in every state. Follows `dualparal/runtime/engine.py`; knows no torch.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dualparal.core.plan import BlockPlan
from dualparal.core.rules import settle_rules
from dualparal.errors import EngineError, JobCancelled, QueueFull, error_from_wire
from dualparal.events import FINAL, BlockReady, Cancelled, Event, Failed, Finished, Progress, Queued, Started
from dualparal.media.writer import VideoWriter
from dualparal.presets import Limits, Preset
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.journal import JobFolder, new_job_id, outputs_folder, write_atomically

FAKE_PRESET = Preset(
    name="pocket", title="Pocket Wan · 96×96", model="pocket", hardware="any CPU", dtype="float32", seconds=4.0,
    height=96, width=96, num_inference_steps=12, guidance_scale=4.0, flow_shift=3.0, num_per_block=4, num_cat=2,
    examples=("a red circle bouncing on a navy background", "two green squares drifting apart on sand"),
    limits=Limits(seconds=120, num_inference_steps=60, num_per_block=32, pixels=512 * 512),
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    stage: str
    start_s: float
    end_s: float
    block: int
    step: int


@dataclass(frozen=True)
class JobView:
    state: str = "queued"
    position: int = 0
    started: Started | None = None
    progress: Progress | None = None
    blocks: tuple[BlockReady, ...] = ()
    final: Event | None = None
    timeline: tuple[Span, ...] = ()
    waits_for: str = ""


@dataclass(frozen=True)
class JobResult:
    path: str
    num_frames: int
    timings: dict[str, float]
    latents: None = None


class FakeJob:
    """One queued, running or ended job; see `Job` in dualparal/runtime/job.py."""

    def __init__(
        self, job_id: str, request: GenerationRequest, owner: str, folder: JobFolder, unqueue: Callable[[FakeJob], bool]
    ) -> None:
        self._unqueue = unqueue
        self.id, self.request, self.owner, self.folder = job_id, request, owner, folder
        self._view = JobView()
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self.stop = threading.Event()

    @property
    def state(self) -> str:
        return self._view.state

    def view(self) -> JobView:
        return self._view

    def tell(self, event: Event, **changes: object) -> None:
        with self._changed:
            self._events.append(event)
            self._view = replace(self._view, **changes)
            self.folder.append(event)
            self._changed.notify_all()

    def release(self) -> None: ...

    def place(self, position: int) -> None:
        self._view = replace(self._view, position=position)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        told = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: len(self._events) > told, timeout):  # noqa: B023 - asked at once
                    raise TimeoutError(f"no event of job {self.id} for {timeout} s")
                event = self._events[told]
            told += 1
            yield event
            if isinstance(event, FINAL):
                return

    def cancel(self) -> None:
        self.stop.set()
        if self._unqueue(self):
            final = Cancelled(job_id=self.id)
            self.tell(final, state="cancelled", final=final)

    def result(self, timeout: float | None = None) -> JobResult:
        *_, final = self.events(timeout)
        if isinstance(final, Failed):
            raise error_from_wire(final.kind, final.message)
        if isinstance(final, Cancelled):
            raise JobCancelled("the job was stopped", final.path)
        assert isinstance(final, Finished)
        return JobResult(final.path, final.num_frames, final.timings)


class FakeEngine:
    """See `Engine`. `item_s`: time of one block step. A prompt with "fail" fails halfway, one with "die" kills the workers.

    A job with `hold_at` finished blocks goes no further until that is raised (or it is stopped), so that a test need not be
    quicker than a job. A restart takes `restart_s`. Both may be changed at any time.
    """

    hold_at = math.inf
    restart_s = 2.0

    def __init__(
        self, preset: Preset = FAKE_PRESET, *, ranks: int = 2, outputs: Path | None = None, max_queue: int = 32,
        item_s: float = 0.02, load_s: float = 0.0, num_experts: int = 1,
    ) -> None:  # fmt: skip
        self.preset, self.ranks, self.outputs, self.max_queue = preset, ranks, outputs_folder(outputs), max_queue
        self.item_s, self.load_s, self.num_experts = item_s, load_s, num_experts
        self.state, self.error, self.has_bytes = "starting", None, 10**9
        self._queue: list[FakeJob] = []
        self._running: FakeJob | None = None
        self._all: dict[str, FakeJob] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()

    def start(self, wait: bool = True) -> FakeEngine:
        threading.Thread(target=self._run, daemon=True).start()
        while wait and self.state == "starting":
            time.sleep(0.01)
        return self

    def __enter__(self) -> FakeEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        return settle_rules(request.resolve(self.preset, num_experts=self.num_experts, boundary_ratio=0.875), self.ranks)

    def plan(self, request: GenerationRequest, *, is_short: bool = False) -> SimpleNamespace:
        """Bytes grow with the picture; more than `has_bytes` is refused."""
        need = 1000 * (request.height or 0) * (request.width or 0)
        refusal = f"this needs {need / 1e6:.1f} MB and there are {self.has_bytes / 1e6:.1f} MB"
        return SimpleNamespace(bytes_per_rank=need, refusal=refusal if need > self.has_bytes else None)

    def submit(self, request: GenerationRequest, *, owner: str = "", **_: object) -> FakeJob:
        request = self.resolve(request)
        if self.state in ("failed", "closed"):
            raise EngineError(self.error or "the engine is closed")
        with self._lock:
            if len(self._queue) >= self.max_queue:
                raise QueueFull(f"{len(self._queue)} jobs are waiting, which is the limit; try again later")
            job_id = new_job_id()
            about = {"model": self.preset.model, "preset": self.preset.name, "owner": owner}
            folder = JobFolder.create(self.outputs, job_id, request, **about)
            job = FakeJob(job_id, request, owner, folder, self._unqueue)
            self._all[job_id] = job
            self._queue.append(job)
            position = len(self._queue) - 1 + (self._running is not None)
            job.place(position)
        job.tell(Queued(job_id=job_id, position=position))
        self._wake.set()
        return job

    can_compare = False

    def job(self, job_id: str) -> FakeJob | None:
        return self._all.get(job_id)

    def jobs(self) -> list[FakeJob]:
        with self._lock:
            return ([self._running] if self._running else []) + list(self._queue)

    def _unqueue(self, job: FakeJob) -> bool:
        with self._lock:
            if job not in self._queue:
                return False
            self._queue.remove(job)
            return True

    def close(self) -> None:
        self.state = "closed"
        for job in self.jobs():
            job.cancel()
        self._wake.set()

    def _run(self) -> None:
        time.sleep(self.load_s)
        if self.state == "starting":
            self.state = "ready"
        while self.state != "closed":
            self._wake.wait(0.05)
            self._wake.clear()
            with self._lock:
                if not self._queue:
                    continue
                self._running = job = self._queue.pop(0)
                for place, waiting in enumerate(self._queue):
                    waiting.place(place + 1)
            self._work(job)
            with self._lock:
                self._running = None
                for place, waiting in enumerate(self._queue):
                    waiting.place(place)
            if self.state == "restarting":
                began_s = time.monotonic()
                while time.monotonic() - began_s < self.restart_s and self.state == "restarting":
                    time.sleep(0.02)
                self.state = "ready" if self.state == "restarting" else self.state
            self._wake.set()

    def _work(self, job: FakeJob) -> None:
        request, began = job.request, time.time()
        assert request.latents_num and request.num_inference_steps and request.fps and request.num_per_block
        sizes = BlockPlan.of(request.latents_num, request.num_per_block, request.num_cat or 0).lengths
        writer = VideoWriter(job.folder.path, width=request.width or 0, height=request.height or 0, fps=request.fps)
        num_steps, num_items = request.num_inference_steps, request.num_inference_steps * len(sizes)
        num_frames = frames_of_latents(request.latents_num)
        started = Started(job_id=job.id, num_blocks=len(sizes), num_items=num_items, num_frames=num_frames)
        job.tell(started, state="running", started=started)
        steps, spans, done, told_s = [0] * len(sizes), [], 0, 0.0
        spans.append(Span("text", 0.0, 0.02, -1, -1))
        blocks: list[BlockReady] = []
        sweep = 0
        while min(steps) < num_steps:
            in_flight = [b for b in range(min(sweep + 1, len(sizes))) if steps[b] < num_steps]
            for block in reversed(in_flight):
                while len(blocks) >= self.hold_at and not job.stop.is_set():
                    time.sleep(0.02)
                if job.stop.is_set():
                    return self._end(job, "cancelled", blocks, spans, writer)
                if "die" in job.request.prompt and done * 2 > num_items:
                    self.state = "restarting"
                    failed = "rank 1 stopped answering (killed by signal 9); the workers are being restarted, queued jobs go on"
                    return self._end(job, "failed", blocks, spans, writer, ("WorkerDied", failed))
                if "fail" in job.request.prompt and done * 2 > num_items:
                    failed = "rank 0 ran out of memory: 812 MiB asked for, 95 MiB free; ask for a smaller num_per_block"
                    return self._end(job, "failed", blocks, spans, writer, ("OutOfMemory", failed))
                at = time.time() - began
                time.sleep(self.item_s)
                for rank in range(self.ranks):
                    lag = rank * self.item_s / self.ranks
                    spans.append(Span(f"stage {rank}", at + lag, at + lag + self.item_s * 0.9, block, steps[block]))
                steps[block] += 1
                done += 1
                if steps[block] == num_steps:
                    at = time.time() - began
                    blocks.append(self._block(job, writer, block, sizes[block]))
                    spans.append(Span("decode", at, time.time() - began, block, -1))
                    job.tell(blocks[-1], blocks=tuple(blocks))
                if time.time() - told_s > 0.25:
                    told_s = time.time()
                    eta_s = (num_items - done) * (told_s - began) / done
                    progress = Progress(
                        job_id=job.id, items_done=done, num_items=num_items, num_steps=num_steps, block_steps=tuple(steps),
                        eta_s=eta_s if done > 3 else None, busy=tuple(0.97 - 0.08 * rank for rank in range(self.ranks)),
                    )  # fmt: skip
                    job.tell(progress, progress=progress)
            sweep += 1
        self._end(job, "finished", blocks, spans, writer)
        return None

    def _block(self, job: FakeJob, writer: VideoWriter, block: int, num_latents: int) -> BlockReady:
        segment = writer.add_block(paint(job.request, writer.num_frames, num_latents * 4 - 3 * (block == 0)))
        return BlockReady(
            job_id=job.id, block=block, path=str(segment.path), first_frame=segment.first_frame,
            num_frames=segment.num_frames, duration_s=segment.duration_s,
        )  # fmt: skip

    def _end(
        self, job: FakeJob, state: str, blocks: list[BlockReady], spans: list[Span], writer: VideoWriter,
        error: tuple[str, str] | None = None,
    ) -> None:  # fmt: skip
        path, num_frames = None, sum(block.num_frames for block in blocks)
        if blocks:
            path = str(writer.finish(job.request.to_json()))
        write_atomically(job.folder.path / "timeline.json", json.dumps([asdict(span) for span in spans]))
        began = next(e.time_s for e in job._events if isinstance(e, Started))
        asked = job._events[0].time_s
        total_s = time.time() - began
        final: Event
        if state == "finished":
            assert path
            timings = {
                "text_s": 0.02, "denoise_s": total_s * 0.8, "decode_s": total_s * 0.1, "encode_s": total_s * 0.05,
                "total_s": total_s, "first_frames_s": blocks[0].time_s - asked,
            }  # fmt: skip
            final = Finished(job_id=job.id, path=path, num_frames=num_frames, timings=timings)
        elif state == "cancelled":
            final = Cancelled(job_id=job.id, path=path, num_frames=num_frames)
        else:
            assert error
            final = Failed(job_id=job.id, kind=error[0], message=error[1], path=path, num_frames=num_frames)
        job.tell(final, state=state, final=final, timeline=tuple(spans))


def paint(request: GenerationRequest, first_frame: int, num_frames: int) -> np.ndarray:
    """A disc bouncing over a slow gradient: [frames, height, width, 3] uint8, the same for the same seed."""
    height, width = request.height or 96, request.width or 96
    rng = np.random.default_rng(request.seed)
    sky, disc = rng.uniform(10, 90, 3), rng.uniform(140, 255, 3)
    ys, xs = np.mgrid[0:height, 0:width]
    frames = []
    for frame in range(first_frame, first_frame + num_frames):
        x = width * (0.5 + 0.36 * np.sin(frame / 9))
        y = height * (0.78 - 0.5 * abs(np.sin(frame / 6)))
        inside = np.clip((0.13 * height - np.hypot(xs - x, ys - y)) / 2 + 0.5, 0, 1)[..., None]
        back = sky * (0.6 + 0.8 * ys / height)[..., None]
        frames.append((back * (1 - inside) + disc * inside).clip(0, 255).astype(np.uint8))
    return np.stack(frames)
