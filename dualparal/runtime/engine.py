"""The engine: one queue of jobs in front of one or more replicas of a worker group.

Lives in the front end, never imports torch, and survives any worker's death. Who goes next is the dispatcher's business,
watching over the workers each replica's; here requests are checked and turned into jobs.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dualparal.core.job_plan import JobPlan
from dualparal.errors import DualParalError, EngineError, RequestError
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.runtime.baseline_lane import CHANGES_OF_LAYERS, BaselineLane, check_fits, check_plain, make_baseline_folder
from dualparal.runtime.claim import claim, create_job
from dualparal.runtime.dispatcher import Dispatcher
from dualparal.runtime.engine_options import (
    changes_of,
)
from dualparal.runtime.equipment import Equipment
from dualparal.runtime.gate import Gate
from dualparal.runtime.host import host_rank
from dualparal.runtime.intake import Admit, Intake
from dualparal.runtime.job import Job
from dualparal.runtime.job_queue import JobQueue
from dualparal.runtime.journal import JobFolder, check_job_id, find_job, new_job_id, outputs_folder
from dualparal.runtime.messages import RunJob
from dualparal.runtime.recovery import check_can_go_on, cut_off, told_blocks, warn_of_other_bits
from dualparal.runtime.replica import Replica
from dualparal.runtime.storage import Storage
from dualparal.runtime.tensors import checked_noise, checked_text
from dualparal.runtime.torchrun import Team, end_with_the_agent

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
STATES = ("ready", "starting", "restarting", "failed")  # of an engine: the best of its replicas'


class Engine:
    """Makes videos with one model on `ranks` processes, or `replicas` times as many.

    Use it as a context manager, or `start` and `close` it.
    """

    def __init__(
        self,
        model: str | Path = "pocket",
        *,
        ranks: int = 1,
        device: str = "auto",
        dtype: str | None = None,
        layer_split: Sequence[int] | str | None = None,
        preset: Preset | None = None,
        threads: int | None = None,
        outputs: str | Path | None = None,
        max_queue: int = 32,
        timeout_s: float = 600.0,
        verbose: bool = False,
        log_json: bool = False,
        replicas: int = 1,
        auto_resume: bool = False,
        max_per_owner: int | None = None,
        max_disk_bytes: int | None = None,
        admit: Admit | None = None,
        worker_hook: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        quantization: str | None = None,
        offload: bool = False,
        offload_cache: bool = False,
        vae_dtype: str | None = None,
        text_encoder: str = "auto",
        loras: Sequence[str] = (),
        team: Team | None = None,
    ) -> None:
        """Check everything that can be checked without loading a weight; start nothing.

        `model` is a preset's name, a folder in diffusers' layout, or a hub id; `device` auto, cpu or cuda; `dtype` of the DiT
        (default: float32 on the CPU, the preset's on GPUs); `layer_split` layers per rank (default: even; "auto": the
        fastest for the preset's video, by `plan --calibrate`'s times or else by FLOPs; bits do not depend on it); `threads`
        CPU threads per process (default: the cores shared out; equal bits on different numbers of ranks need equal threads);
        `timeout_s` is the longest wait for another rank within a job, and the longest that one block step, prompt or latent
        frame may take before its worker counts as hung; `attention` a backend of diffusers' dispatcher (native, flash, sage,
        ...); `compile` runs layers through torch.compile; `quantization` fp8 or int8: 8-bit weights; `offload`:
        layers wait in host memory and come to the GPU one by one; `offload_cache`: so do the K and V of left neighbours, which
        `context="cached"` keeps; `vae_dtype` of the VAE (default: the preset's); `text_encoder` keep, free or cpu: where it is
        after encoding (auto: keep where the preset's video fits beside it, else cpu on GPUs and free on the CPU); `loras`
        "file, folder or hub id[:scale]". From `attention` on all change the numbers but where things wait (`offload`,
        `offload_cache`, `text_encoder`). Raises `RequestError`, `PresetError`, `CheckpointError`.

        Serving many: `replicas` worker groups take jobs from one queue; `auto_resume`: a job whose worker died goes on by
        itself, once; at most `max_queue` jobs wait, `max_per_owner` of one owner wait and run; videos of ended jobs are
        deleted, the oldest first, to stay under `max_disk_bytes`; `admit` may refuse a resolved request with a sentence;
        `log_json`: workers log one JSON object a line. `team`: one pipeline over torchrun's processes (`torchrun.find_team`),
        each a rank; only the first may be started, the others `host`.
        """
        gear = self._gear = Equipment(
            model, preset, ranks=ranks, replicas=replicas, device=device, dtype=dtype, layer_split=layer_split, threads=threads,
            timeout_s=timeout_s, verbose=verbose, log_json=log_json, worker_hook=worker_hook, attention=attention,
            compile=compile, quantization=quantization, offload=offload, offload_cache=offload_cache, vae_dtype=vae_dtype,
            text_encoder=text_encoder, loras=loras, team=team,
        )  # fmt: skip
        self.preset, self.checkpoint, self.num_experts = gear.preset, gear.checkpoint, gear.num_experts
        self.ranks, self.num_replicas, self.team = gear.ranks, replicas, team
        self.outputs = outputs_folder(outputs)
        storage = Storage(self.outputs, max_disk_bytes)
        self.desk = Dispatcher(
            JobQueue(max_jobs=max_queue, max_per_owner=max_per_owner),
            auto_resume=auto_resume,
            check=lambda job: storage.check_free(job.request, job.id),
        )
        self.replicas = tuple(
            Replica(f"replica {n}", dataclasses.replace(gear.options, devices=own, codec_device=codec), self.desk)
            for n, (own, codec) in enumerate(gear.places)
        )  # each with its own `state`, `workers` and `error`
        self.desk.replicas = self.replicas
        self._baselines = BaselineLane(
            gear.options.devices[0], self.text_encoder, is_idle=lambda: not self.desk.jobs(), on_end=self.desk.note_end
        )
        self._intake = Intake(self.desk, self._baselines, storage, admit)
        self._is_started = False

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or closed; ready as soon as one replica is."""
        found = {replica.state for replica in self.replicas}
        return next((state for state in STATES if state in found), "closed")

    @property
    def error(self) -> str | None:
        """Why a replica is restarting or has failed; None while all is well."""
        return next((str(replica.error) for replica in self.replicas if replica.error is not None), None)

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """What each worker said when it was ready; with several replicas under "replica 1 rank 0"."""
        if self.num_replicas == 1:
            return self.replicas[0].workers
        return {f"{r.name} {name}": about for r in self.replicas for name, about in r.workers.items()}

    @property
    def dtype(self) -> str:
        return self._gear.options.dtype

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers per rank."""
        return self._gear.placement.layers

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return self._gear.options.threads

    @property
    def text_encoder(self) -> str:
        """Where the text encoder is after encoding: keep, free or cpu."""
        return self._gear.placement.text_encoder

    # Life

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, wait: bool = True) -> Engine:
        """Start the workers; with `wait`, return when they are ready or raise what stopped them."""
        with self.desk.changed:
            if self._is_started:
                raise EngineError("this engine has been started before; make a new one")
            self._is_started = True
            if self.team is not None:
                end_with_the_agent()
                self._gate = self.replicas[0].gate = Gate(self.team)
            for replica in self.replicas:
                replica.start()
        self._at_exit = _close_at_exit(self)
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until a replica can take a job; raises what stopped them, or TimeoutError."""
        with self.desk.changed:
            if not self.desk.changed.wait_for(lambda: self.state in ("ready", "failed", "closed"), timeout):
                raise TimeoutError(f"the engine was not ready within {timeout} s")
            if self.state != "ready":
                raise self._failure()

    def close(self) -> None:
        """Stop what runs and end every process. Jobs that have not ended fail with `EngineError`; on disk they count as cut
        off, so that `recover` goes on with them. May be called twice."""
        with self.desk.changed:
            self.desk.is_closing = True
            self.desk.changed.notify_all()  # replicas that pause before the next start
        for replica in self.replicas:
            replica.wake()
        self._baselines.close()
        for replica in self.replicas:
            replica.join()
        self.desk.end_all(EngineError("the engine was closed before the job was done"), is_stored=False)
        if self._gate is not None:
            self._gate.close()
        self.desk.store_owed(is_last=True)
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

    def host(self) -> int:
        """On torchrun's ranks other than 0, in place of `start`: run this rank's worker until rank 0 ends; the exit code."""
        assert self.team is not None and not self.team.is_front_end
        return host_rank(self.team, self._gear.options)

    _at_exit: Callable[[], None] | None = None
    _gate: Gate | None = None

    # Jobs

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """`request` with every field filled, checked against the preset's limits; raises `RequestError`."""
        return self._gear.resolve(request)

    def plan(self, request: GenerationRequest, *, is_short: bool = False) -> JobPlan:
        """What `request` needs of this engine's devices: bytes, and times once `plan --calibrate` has been run on them.

        `is_short` leaves the times out and is quick for any length. `.refusal` is what `submit` would say.
        """
        return self._gear.plan(request, is_short=is_short)

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
        has_tensors = any(x is not None for x in (latents, prompt_embeds, negative_prompt_embeds))
        job_id = new_job_id() if job_id is None else check_job_id(job_id)
        self._intake.check(resolved)
        self._check_open()
        with self._intake.taking(resolved, owner, job_id), self.desk.changed:
            self._check_open()
            folder = create_job(
                self.outputs, job_id, resolved, preset=self.preset.name, owner=owner, ranks=self.ranks, layers=self.layers,
                text_encoder=self.text_encoder, export_images=export_images, has_tensors=has_tensors, **self._gear.made_with(),
            )  # fmt: skip
            run = RunJob(folder.job_id, resolved, str(folder.path), return_latents, export_images, noise, cond, uncond)
            return self._add(run, folder, owner)

    @property
    def can_compare(self) -> bool:
        """Whether `compare` takes jobs: not with options that change the layers' numbers."""
        return not self.changes().keys() & CHANGES_OF_LAYERS

    def compare(self, request: GenerationRequest, *, owner: str = "") -> Job:
        """Queue `request` for plain Wan: diffusers' `WanPipeline`, the whole video at once on the first rank's device.

        It runs in a process of its own as soon as this engine has nothing to do. Raises as `submit` does.
        """
        resolved, job_id = self.resolve(request), new_job_id()
        check_plain(self.changes())
        check_fits(self.plan(resolved, is_short=True), self._gear.sizes, num_replicas=self.num_replicas)
        self._intake.check(resolved)
        self._check_open()
        with self._intake.taking(resolved, owner, job_id):
            self._check_open()
            job = self._baselines.submit(make_baseline_folder(self, resolved, job_id, owner=owner), owner)
            self.desk.note(job)
            return job

    def _check_open(self) -> None:
        if self.desk.is_closing or self.state in ("failed", "closed"):
            raise self._failure()

    def _add(self, run: RunJob, folder: JobFolder, owner: str) -> Job:
        job = Job(run, folder, owner, self.desk.cancel, on_end=self.desk.note_end, claim=claim(folder))
        if run.is_resumed:
            job.tell_again(told_blocks(folder))
        self.desk.add(job)
        return job

    def changes(self) -> dict[str, Any]:
        """Options that change the numbers, as a job's record keeps them; empty for the model as it is."""
        return changes_of(self._gear.options)

    def resume(self, job_id: str, *, return_latents: bool = False) -> Job:
        """Queue a job of this outputs folder again that was interrupted, stopped or failed; it goes on from its last saved
        sweep and gives the bits it would have given. Raises `RequestError` when there is nothing to resume, and as `submit`."""
        folder = find_job(self.outputs, job_id)
        self._check_can_go_on(folder)  # before anything is deleted for it
        with self._intake.taking(folder.request(), str(folder.record().get("owner", "")), job_id):
            return self._go_on(folder, return_latents)

    def recover(self) -> list[Job]:
        """Queue again, the oldest first, what was waiting or running when the program last ended; returns these jobs.

        Call it once, before new jobs come. Jobs of other programs and of other models are left alone.
        """
        found = []
        for folder in cut_off(self.outputs):
            try:
                found.append(self._go_on(folder))
            except DualParalError as error:
                log.warning("job %s is left as it is: %s", folder.job_id, error, extra={"job_id": folder.job_id})
        return found

    def _check_can_go_on(self, folder: JobFolder) -> None:
        if self.desk.is_closing or self.state == "failed" or (self._is_started and self.state == "closed"):
            raise self._failure()
        known = self.desk.get(folder.job_id)
        if known is not None and not known.has_ended:
            raise RequestError(f"job {folder.job_id} has not ended; there is nothing to resume", "job_id")
        check_can_go_on(folder, self._gear.made_with())

    def _go_on(self, folder: JobFolder, return_latents: bool = False) -> Job:
        with self.desk.changed:
            self._check_can_go_on(folder)
            warn_of_other_bits(folder, self._gear.made_with())
            folder.stop_wish.unlink(missing_ok=True)
            record = folder.record()
            run = RunJob(
                folder.job_id, folder.request(), str(folder.path), return_latents, bool(record.get("export_images")),
                is_resumed=True,
            )  # fmt: skip
            return self._add(run, folder, str(record.get("owner", "")))

    def job(self, job_id: str) -> Job | None:
        """A job of this run by id; older ones are on disk (`journal.find_job`, `registry.list_facts`)."""
        return self.desk.get(job_id)

    def jobs(self) -> list[Job]:
        """Jobs that have not ended: those at work first, then the queue in the order they will run."""
        return [*self.desk.jobs(), *self._baselines.jobs()]

    def forget(self, job_id: str) -> None:
        """Drop an ended job from memory (its files stay). The oldest are dropped without being asked for."""
        self.desk.forget(job_id)

    def _failure(self) -> DualParalError:
        if self.state == "failed" and (error := next((r.error for r in self.replicas if r.error), None)) is not None:
            return error
        return EngineError("the engine is closed; start a new one")


def _close_at_exit(engine: Engine) -> Callable[[], None]:
    """An engine that was never closed is closed when the interpreter ends."""
    known = weakref.ref(engine)

    def close() -> None:
        if (found := known()) is not None:
            found.close()

    atexit.register(close)
    return close
