"""Rank 0's loop: one job after another from the front end; its prompt goes to the codec, and so do its finished blocks.

It knows of queues and messages; what happens within a job is `coordinator`'s business.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from dualparal.errors import DualParalError, JobCancelled, NotFinite, RequestError, WorkerDied
from dualparal.events import Started
from dualparal.files import STATE_FOLDER
from dualparal.logs import working_on
from dualparal.messages import (
    TOO_LATE,
    CancelJob,
    CloseVideo,
    DecodeBlock,
    Denoised,
    Finish,
    JobError,
    JobSpec,
    OpenVideo,
    Played,
    RunJob,
    Shutdown,
    Spans,
    Steer,
    SteerAnswer,
    TurnVideo,
    WorkerOptions,
)
from dualparal.method.borders import rest_border
from dualparal.method.noise import CoordinatedNoise, Ghost
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Item, Schedule, make_schedule
from dualparal.method.timeline import text_plan
from dualparal.model.latent_rgb import LatentRgb
from dualparal.model.layout import Checkpoint
from dualparal.model.stage import JobShape, Stage
from dualparal.request import Settings
from dualparal.ring.arrays import tensor_of
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.encoding import Encoding
from dualparal.ring.looks import Looks
from dualparal.ring.progress import ProgressReport
from dualparal.ring.rings import Trips
from dualparal.ring.saved_sweeps import FinishedBlocks, StateWriter, read_state
from dualparal.ring.stage_loop import SpanLog
from dualparal.ring.start import start_latents
from dualparal.ring.steering import Steering
from dualparal.ring.texts import TextTrips
from dualparal.ring.transport import Links
from dualparal.ring.viewing import IN_PLACE_S, Viewing
from dualparal.ring.worker import Uplink, describe_error

log = logging.getLogger(__name__)
NOT_SAVED = (
    "with context=cached and refresh=0 a job cannot be resumed to the same bits from where it was cut off: it starts again "
    "from its first block; leave refresh out to have it saved on the way"
)


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
        find_map: Callable[[], LatentRgb | None] = lambda: None,
    ) -> None:
        """`find_map` gives what makes early looks, None while it is not known."""
        self._find_map = find_map
        self._stage, self._links, self._checkpoint, self._uplink = stage, links, checkpoint, uplink
        self._requests, self._to_codec = requests, to_codec
        text_dim = int(checkpoint.config("transformer").get("text_dim", 4096))
        self._encoding = Encoding(to_codec, from_codec, text_dim, options.engine.timeout_s)
        self._vae_config = checkpoint.config("vae")
        self._waiting: list[RunJob | Shutdown] = []
        self._running: str | None = None
        self._steering: Steering | None = None  # of the job that runs
        self._viewing: Viewing | None = None  # of it, too
        self._cancelled: set[str] = set()  # only jobs that run or wait here

    def serve(self) -> None:
        """Until Shutdown: take a job, run it, tell the front end."""
        while True:
            while not self._waiting:
                self._take(self._requests.get())
            message = self._waiting.pop(0)
            if isinstance(message, Shutdown):
                if self._links.grid.ranks > 1:
                    self._links.broadcast(None)
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
            if self._steering is not None:
                self._steering.refuse_all()
                self._steering = self._viewing = None
            self._cancelled.discard(message.job_id)
            self._uplink.send(Denoised(message.job_id))
            working_on(None)

    def _take(self, message: object) -> None:
        if isinstance(message, CancelJob):
            # One that comes too late is not for the next run of that job.
            if message.job_id in (self._running, *(run.job_id for run in self._waiting if isinstance(run, RunJob))):
                self._cancelled.add(message.job_id)
        elif isinstance(message, Steer | Finish):
            if self._steering is not None and message.job_id == self._running:
                self._steering.ask(message)
            else:
                self._uplink.send(SteerAnswer(message.job_id, message.number, refusal=TOO_LATE))
        elif isinstance(message, Played):
            if self._viewing is not None and message.job_id == self._running:
                self._viewing.tell(message.seconds)
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
        job_id, request = job.job_id, job.request
        plan = plan_of(request)

        def check(steered: Settings) -> None:
            self._noise(replace(job, request=steered), plan_of(steered), *self._latent_size(steered))

        steering = self._steering = Steering(job, self._encoding, self._uplink.send, check)
        viewing = self._viewing = Viewing(request)
        num_items = plan.num_blocks * request.num_inference_steps
        started = Started(job_id=job.job_id, num_blocks=plan.num_blocks, num_items=num_items, num_frames=plan.num_frames)
        self._uplink.send(started)
        timings: dict[str, float] = {}
        height, width = self._latent_size(request)
        folder = Path(job.folder) / STATE_FOLDER
        if request.context == "cached" and not request.refresh and plan.num_blocks > 1:
            log.warning(NOT_SAVED)
        state, before = read_state(folder) if job.is_resumed else (None, FinishedBlocks(folder))
        noise = self._noise(job, plan, height, width)
        to_hear = text_plan(request, plan)
        check_stop = functools.partial(self._check_stop, job.job_id)
        texts, uncond, notice = self._encoding.texts(job, to_hear, timings, check_stop)
        if notice:
            log.warning(notice)
            self._uplink.send(replace(started, notice=notice))
        self._stage.use_loras(job.loras)
        start = start_latents(
            job, lambda picture: self._encoding.picture(job, picture, timings, check_stop),
            lambda clip: self._encoding.clip(job, clip, timings, check_stop),
        )  # fmt: skip
        shown = start if plan.is_ghost_shown else None
        unseen = None if start is None or plan.is_ghost_shown else start.numpy()
        self._to_codec.put(OpenVideo(job, *_px(request), unseen))
        started_s = time.monotonic()
        samplers = SamplerFactory(
            self._checkpoint.config("scheduler"), num_steps=request.num_inference_steps,
            flow_shift=request.flow_shift, device=self._stage.device, solver=request.solver,
        )  # fmt: skip
        guidance = request.guidance_scale, request.guidance_scale_2
        spec = JobSpec(
            job.job_id,
            rules_of(request),
            plan,
            samplers.experts(request.boundary_ratio),
            JobShape(height, width, 1 + len(uncond), guidance, to_hear.of_block),
            self._stage.embed_conditions(samplers.timesteps, [[texts[0], *uncond]]),
            start=state.next_index if state else 0,
            loras=job.loras,
        )
        schedule = make_schedule(spec.rules, plan, spec.experts)
        self._links.broadcast(spec)
        self._stage.begin(spec.shape, schedule, spec.conditions)
        progress = ProgressReport(job.job_id, schedule, self._uplink, spec.start)
        saver = StateWriter(folder)
        looks = Looks(job.job_id, request.num_inference_steps, self._find_map, self._uplink.send)

        def on_block(block: int, latents: torch.Tensor) -> None:
            self._decode(job, block, latents, shown)
            viewing.made(plan.frames(block).stop)

        def waits(item: Item, most_s: float) -> bool:
            """Whether the ranks are to leave before `item`, for whoever watches to come nearer or for another timeline."""
            if not viewing.holds(item):
                return False
            progress.hold()
            is_called = viewing.wait(lambda: self._is_stopped(job_id) or steering.is_due(item, schedule), most_s)
            return is_called or viewing.holds(item)

        denoiser = Denoiser(
            self._stage, self._links, schedule, samplers, noise,
            is_stopped=lambda: self._is_stopped(job.job_id),
            on_step=progress.step,
            on_block=on_block,
            spans=SpanLog(self._links.grid.names[0], lambda spans: self._uplink.send(Spans(job.job_id, tuple(spans)))),
            saver=saver, looks=looks, trips=self._trips(spec, schedule),
            say=lambda text: self._stage.embed_text(texts[text]),
            turns=lambda item: steering.is_due(item, schedule) or waits(item, IN_PLACE_S),
            ghost=None if start is None else Ghost(
                start[:, :, -plan.num_left(0) :], request.seed, samplers.sigmas, is_clean=self._stage.is_start_clean(plan)
            ),
            rest=rest_border(schedule, job.rest_at),
        )  # fmt: skip
        for block, latents in enumerate(before):
            on_block(block, latents)
        if state is not None:
            denoiser.restore(state)
        try:
            finished = denoiser.run()
            while denoiser.is_turning:
                if steering.job is job:  # nothing new: whoever watches does not play on
                    waits(schedule.items[denoiser.next_index], math.inf)
                job = steering.job
                plan, at = plan_of(job.request), denoiser.next_index
                to_hear = text_plan(job.request, plan)
                texts = self._encoding.known(to_hear)
                spec = replace(
                    spec, plan=plan, shape=replace(spec.shape, text_of_block=to_hear.of_block), start=at, is_turn=True,
                    conditions=self._stage.embed_conditions(samplers.timesteps, [[texts[0], *uncond]]),
                )  # fmt: skip
                schedule = make_schedule(spec.rules, plan, spec.experts)
                self._links.broadcast(spec)
                self._stage.turn(spec.shape, schedule, spec.conditions)
                self._to_codec.put(TurnVideo(job))
                progress.follow(schedule, at)
                assert isinstance(noise, CoordinatedNoise)  # a job with given noise is not turned
                noise.follow(plan)
                denoiser.turn(schedule, self._trips(spec, schedule))
                finished = denoiser.run()
        except NotFinite:
            self._stage.end()
            saver.close()
            raise
        finally:
            looks.close()
        self._stage.end()
        timings["denoise_s"] = time.monotonic() - started_s - viewing.held_s
        saver.close()
        timings["save_s"] = saver.seconds
        timings["look_s"] = looks.seconds
        self._to_codec.put(CloseVideo(job.job_id, not finished, timings))

    def _trips(self, spec: JobSpec, schedule: Schedule) -> Trips:
        return {ring: TextTrips(spec.shape, schedule, spec.conditions, ring) for ring in self._links.grid.rings}

    def _decode(self, job: RunJob, block: int, latents: torch.Tensor, shown: torch.Tensor | None) -> None:
        """Hand a finished block to the codec, and with the first what is `shown` before it."""
        latents = latents.cpu()
        if block == 0 and shown is not None:
            latents = torch.cat([shown, latents], dim=2)
        self._to_codec.put(DecodeBlock(job.job_id, block, latents.numpy()))

    def _latent_size(self, request: Settings) -> tuple[int, int]:
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
            return (tensor_of(array) for array in job.latents)
        if max(plan.num_left(b) + plan.lengths[b] + plan.num_right(b) for b in range(plan.num_blocks)) > self._stage.max_frames:
            raise RequestError(f"num_per_block is too large: the model takes {self._stage.max_frames} latents at once",
                               "num_per_block")  # fmt: skip
        return CoordinatedNoise(
            plan, job.request.num_per_block, job.request.seed, channels=channels, height=height, width=width
        )


def _px(request: Settings) -> tuple[int, int]:
    return request.height, request.width
