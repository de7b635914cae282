"""Rank 0's loop: one job after another from the front end; its prompt goes to the codec, and so do its finished blocks.

It knows of queues and messages; what happens within a job is `coordinator`'s business.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualparal.core.noise import coordinated_noise
from dualparal.core.plan import BlockPlan
from dualparal.core.rules import plan_of, rules_of
from dualparal.core.sampler import SamplerFactory
from dualparal.core.schedule import Item, Schedule, make_schedule
from dualparal.errors import DualParalError, JobCancelled, RequestError, WorkerDied
from dualparal.events import Progress, Started
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import JobShape, Stage
from dualparal.request import GenerationRequest, frames_of_latents
from dualparal.runtime.coordinator import Denoiser
from dualparal.runtime.journal import STATE_FOLDER
from dualparal.runtime.kept_caches import read_caches
from dualparal.runtime.logs import working_on
from dualparal.runtime.messages import (
    CancelJob,
    CloseVideo,
    DecodeBlock,
    Denoised,
    Embeddings,
    EncodeText,
    JobError,
    JobSpec,
    OpenVideo,
    RunJob,
    Shutdown,
    Spans,
    WorkerOptions,
)
from dualparal.runtime.stage_worker import SpanLog
from dualparal.runtime.state import StageShare, StateWriter, read_state
from dualparal.runtime.transport import Links
from dualparal.runtime.worker import Uplink, describe_error

PROGRESS_INTERVAL_S = 0.2
LOOK_INTERVAL_S = 0.2  # for a stop, while the codec encodes


class Coordinator:
    """Rank 0's loop: one request at a time from the front end's queue."""

    def __init__(
        self,
        stage: Stage,
        links: Links,
        checkpoint: Checkpoint,
        uplink: Uplink,
        requests: Queue[Any],
        to_codec: Queue[Any],
        from_codec: Queue[Any],
        options: WorkerOptions,
    ) -> None:
        self._stage, self._links, self._checkpoint, self._uplink = stage, links, checkpoint, uplink
        self._requests, self._to_codec, self._from_codec = requests, to_codec, from_codec
        self._timeout_s = options.timeout_s
        self._vae_config = checkpoint.config("vae")
        self._waiting: list[RunJob | Shutdown] = []
        self._running: str | None = None
        self._cancelled: set[str] = set()  # only jobs that run or wait here

    def serve(self) -> None:
        """Until Shutdown: take a job, run it, tell the front end."""
        while True:
            while not self._waiting:
                self._take(self._requests.get())
            message = self._waiting.pop(0)
            if isinstance(message, Shutdown):
                self._links.broadcast(None) if self._links.ranks > 1 else None
                self._to_codec.put(message)
                self._to_codec.close()
                self._to_codec.join_thread()
                return
            working_on(message.job_id)
            self._running = message.job_id
            try:
                self._run(message)
            except DualParalError as error:
                if isinstance(error, WorkerDied):
                    raise
                self._uplink.send(JobError(message.job_id, *describe_error("rank 0", error)))
            self._running = None
            self._cancelled.discard(message.job_id)
            self._uplink.send(Denoised(message.job_id))
            working_on(None)

    def _take(self, message: object) -> None:
        if isinstance(message, CancelJob):
            # One that comes too late is not for the next run of that job.
            if message.job_id in (self._running, *(run.job_id for run in self._waiting if isinstance(run, RunJob))):
                self._cancelled.add(message.job_id)
        else:
            assert isinstance(message, RunJob | Shutdown)
            self._waiting.append(message)

    def _is_stopped(self, job_id: str) -> bool:
        while not self._requests.empty():
            self._take(self._requests.get())
        return job_id in self._cancelled or any(isinstance(message, Shutdown) for message in self._waiting)

    def _check_stop(self, job_id: str) -> None:
        if self._is_stopped(job_id):
            raise JobCancelled(f"job {job_id} was stopped before its first block step")

    def _run(self, job: RunJob) -> None:
        request = job.request
        assert request.latents_num and request.num_per_block and request.num_cat is not None and request.flow_shift
        assert request.num_inference_steps and request.schedule and request.guidance_scale is not None
        assert request.guidance_scale_2 is not None and request.seed is not None
        plan = plan_of(request)
        num_items = plan.num_blocks * request.num_inference_steps
        self._uplink.send(
            Started(job_id=job.job_id, num_blocks=plan.num_blocks, num_items=num_items,
                    num_frames=frames_of_latents(plan.latents_num))
        )  # fmt: skip
        timings: dict[str, float] = {}
        height, width = self._latent_size(request)
        folder, is_cached = Path(job.folder) / STATE_FOLDER, request.context == "cached"
        num_layers = self._checkpoint.num_layers
        state, before = read_state(folder, num_layers if is_cached else None) if job.is_resumed else (None, [])
        noise = self._noise(job, plan, height, width)
        texts = self._texts(job, timings)
        self._to_codec.put(OpenVideo(job, *_px(request)))
        started_s = time.monotonic()
        samplers = SamplerFactory(
            self._checkpoint.config("scheduler"), num_steps=request.num_inference_steps,
            flow_shift=request.flow_shift, device=self._stage.device,
        )  # fmt: skip
        spec = JobSpec(
            job.job_id,
            rules_of(request),
            plan,
            samplers.experts(request.boundary_ratio),
            JobShape(height, width, len(texts[0]), (request.guidance_scale, request.guidance_scale_2), (0,) * plan.num_blocks),
            self._stage.embed_conditions(samplers.timesteps, texts),
            start=state.next_index if state else 0,
            state_folder=str(folder),
            caches_of=state.sweep if state and is_cached else None,
        )
        schedule = make_schedule(spec.rules, plan, spec.experts)
        # Before the others wait for this job's first message: what is damaged here ends the job, not the ring.
        tails = read_caches(folder, spec.caches_of, self._stage.layers) if spec.caches_of is not None else None
        self._links.broadcast(spec)
        self._stage.begin(spec.shape, schedule, spec.conditions)
        if tails is not None:
            self._stage.restore_tails(tails)
        progress = ProgressReport(job.job_id, schedule, self._uplink, spec.start)
        saver = StateWriter(folder, share=StageShare(self._stage.layers, num_layers) if is_cached else None)
        denoiser = Denoiser(
            self._stage, self._links, schedule, samplers, noise,
            is_stopped=lambda: self._is_stopped(job.job_id),
            on_step=progress.step,
            on_block=lambda block, latents: self._to_codec.put(DecodeBlock(job.job_id, block, latents.cpu().numpy())),
            spans=SpanLog("stage 0", lambda spans: self._uplink.send(Spans(job.job_id, tuple(spans)))),
            saver=saver,
        )  # fmt: skip
        for block, latents in enumerate(before):
            self._to_codec.put(DecodeBlock(job.job_id, block, latents.numpy()))
        if state is not None:
            denoiser.restore(state)
        finished = denoiser.run()
        self._stage.end()
        timings["denoise_s"] = time.monotonic() - started_s
        saver.close()
        timings["save_s"] = saver.seconds
        self._to_codec.put(CloseVideo(job.job_id, not finished, timings))

    def _latent_size(self, request: GenerationRequest) -> tuple[int, int]:
        scale = int(self._vae_config.get("scale_factor_spatial") or 8)
        height, width = _px(request)
        for name, size, patch in (("height", height, self._stage.patch_size[1]), ("width", width, self._stage.patch_size[2])):
            if size % (scale * patch):
                raise RequestError(f"{name}={size} does not fit this model; use a multiple of {scale * patch}", name)
        return height // scale, width // scale

    def _noise(self, job: RunJob, plan: BlockPlan, height: int, width: int) -> Iterator[torch.Tensor]:
        channels = self._stage.channels
        if job.latents is not None:
            shapes = [(1, channels, length, height, width) for length in plan.lengths]
            given = [array.shape for array in job.latents]
            if given != shapes:
                raise RequestError(f"latents have shapes {given}; this request needs {shapes}", "latents")
            return (torch.from_numpy(array) for array in job.latents)
        if max(plan.num_left(b) + plan.lengths[b] + plan.num_right(b) for b in range(plan.num_blocks)) > self._stage.max_frames:
            raise RequestError(f"num_per_block is too large: the model takes {self._stage.max_frames} latents at once",
                               "num_per_block")  # fmt: skip
        assert job.request.seed is not None and job.request.num_per_block is not None
        return coordinated_noise(
            plan, job.request.num_per_block, job.request.seed, channels=channels, height=height, width=width
        )

    def _texts(self, job: RunJob, timings: dict[str, float]) -> list[list[torch.Tensor]]:
        """The text's guidance halves, from the caller or the codec; raises `JobCancelled` when the job is stopped meanwhile."""
        request = job.request
        assert request.guidance_scale is not None and request.negative_prompt is not None
        prompts = [request.prompt, request.negative_prompt][: 2 if request.guidance_scale > 1 else 1]
        halves: list[np.ndarray | None] = [job.prompt_embeds, job.negative_prompt_embeds][: len(prompts)]
        missing = [i for i, half in enumerate(halves) if half is None]
        if missing:
            self._to_codec.put(EncodeText(job.job_id, tuple(prompts[i] for i in missing)))
            answer = self._await_embeddings(job.job_id)
            timings["text_s"] = answer.seconds
            for i, array in zip(missing, answer.arrays, strict=True):
                halves[i] = array
        text_dim = int(self._checkpoint.config("transformer").get("text_dim", 4096))
        for half in halves:
            assert half is not None
            if half.ndim != 3 or half.shape[0] != 1 or half.shape[2] != text_dim:
                raise RequestError(f"prompt_embeds have shape {list(half.shape)}; they must be [1, tokens, {text_dim}]",
                                   "prompt_embeds")  # fmt: skip
        self._check_stop(job.job_id)
        return [[torch.from_numpy(half) for half in halves if half is not None]]

    def _await_embeddings(self, job_id: str) -> Embeddings:
        """The codec's answer to this job; it may still be busy with one that has been stopped."""
        deadline_s = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline_s:
            self._check_stop(job_id)
            try:
                answer: Embeddings = self._from_codec.get(timeout=LOOK_INTERVAL_S)
            except queue.Empty:
                continue
            if answer.job_id == job_id:
                return answer
        raise WorkerDied(f"the codec did not encode the prompt within {self._timeout_s:.0f} s")


class ProgressReport:
    """Counts block steps and tells the front end a few times a second."""

    def __init__(self, job_id: str, schedule: Schedule, uplink: Uplink, start: int = 0) -> None:
        self._job_id, self._num_steps, self._uplink = job_id, schedule.num_steps, uplink
        self._steps = [0] * schedule.plan.num_blocks
        # Window frames are a fair measure of an item's work.
        self._frames = {(item.block, item.step): sum(schedule.window_frames(item)) for item in schedule.items if item.is_whole}
        self._total = sum(self._frames.values())
        self._done = 0
        for item in schedule.items[:start]:
            if item.is_whole:
                self._steps[item.block] = item.step + 1
                self._done += self._frames[item.block, item.step]
        self._resumed_at = self._done
        self._started_s = time.monotonic()
        self._sent_s = 0.0

    def step(self, item: Item) -> None:
        self._steps[item.block] = item.step + 1
        self._done += self._frames[item.block, item.step]
        if self._done == self._resumed_at:  # skipped steps only: no work yet to tell the time by
            return
        now_s = time.monotonic()
        is_last = self._done == self._total
        if now_s - self._sent_s < PROGRESS_INTERVAL_S and not is_last and item.step + 1 < self._num_steps:
            return
        self._sent_s = now_s
        rate = (self._done - self._resumed_at) / max(now_s - self._started_s, 1e-6)
        self._uplink.send(
            Progress(
                job_id=self._job_id,
                items_done=sum(self._steps),
                num_items=len(self._steps) * self._num_steps,
                num_steps=self._num_steps,
                block_steps=tuple(self._steps),
                eta_s=(self._total - self._done) / rate,
            )
        )


def _px(request: GenerationRequest) -> tuple[int, int]:
    assert request.height and request.width
    return request.height, request.width
