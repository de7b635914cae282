"""The engine: one queue of jobs in front of one or more replicas of a worker group.

Lives in the front end, never imports torch, and survives any worker's death. Who goes next is the dispatcher's business,
watching over the workers each replica's; here requests are checked and turned into jobs.
"""

from __future__ import annotations

import atexit
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dualparal.engine.admission import Admission, Admit
from dualparal.engine.beginning import like_its_film, with_beginning
from dualparal.engine.comparer import CHANGES_OF_LAYERS, Comparer, check_fits, check_plain
from dualparal.engine.dispatcher import Dispatcher
from dualparal.engine.given_tensors import checked_tensors
from dualparal.engine.replica import STUCK_S, Replica
from dualparal.engine.resumption import Resumption
from dualparal.engine.setup import EngineSetup
from dualparal.engine.takes import check_one, submit_takes
from dualparal.errors import DualParalError, EngineError, RequestError
from dualparal.hosts.host import host_rank
from dualparal.hosts.listener import HostListener
from dualparal.hosts.torchrun import Team, end_with_the_agent
from dualparal.jobs.claim import create_job
from dualparal.jobs.folder import JobFolder, check_job_id, new_job_id, outputs_folder
from dualparal.jobs.job import Job
from dualparal.jobs.queue import JobQueue
from dualparal.jobs.storage import Storage
from dualparal.messages import RunJob, Take
from dualparal.model.lora_shelf import LoraShelf
from dualparal.options import EngineOptions
from dualparal.paths import check_can_write
from dualparal.planning.job_plan import JobPlan
from dualparal.presets import Preset
from dualparal.request import GenerationRequest, Settings

if TYPE_CHECKING:
    import torch


class Engine:
    """Makes videos with one model on `ranks` processes, or `replicas` times as many.

    Use it as a context manager, or `start` and `close` it.
    """

    def __init__(
        self,
        model: str | Path = "pocket",
        *,
        preset: Preset | None = None,
        admit: Admit | None = None,
        team: Team | None = None,
        **options: Any,
    ) -> None:
        """Check everything that can be checked without loading a weight; start nothing.

        `model` is a preset's name, a folder in diffusers' layout, or a hub id; `options` are the fields of `EngineOptions`
        (`ranks=2, device="cpu", dtype="float32", layer_split=[15, 15], loras=["file:0.8"]` ...), each described there.
        `admit` may refuse a resolved request with a sentence. `team`: one pipeline over torchrun's processes
        (`torchrun.find_team`), each a rank; only the first may be started, the others `host`. Raises `RequestError`,
        `PresetError`, `CheckpointError`, `OutputError`.
        """
        asked = EngineOptions(**options)
        self.outputs = outputs_folder(asked.outputs)
        check_can_write(self.outputs, "name another folder with --outputs or DUALPARAL_OUTPUTS")  # before a download
        setup = self._setup = EngineSetup(model, preset, asked, team)
        self.preset, self.checkpoint, self.num_experts = setup.preset, setup.checkpoint, setup.num_experts
        self.ranks, self.grid, self.num_replicas, self.team = setup.ranks, setup.grid, asked.replicas, team
        storage = Storage(self.outputs, asked.max_disk_bytes)
        self.dispatcher = Dispatcher(
            JobQueue(max_jobs=asked.max_queue, max_per_owner=asked.max_per_owner),
            auto_resume=asked.auto_resume,
            check=lambda job: storage.check_free(job.request, job.id),
            has_room=lambda job: storage.has_room_for_more(job.request, job.id, job.view().begun),
            turn_s=setup.preset.limits.seconds,
        )
        self.replicas = tuple(
            Replica(f"replica {n}", dataclasses.replace(setup.options, devices=own, codec_device=codec), self.dispatcher)
            for n, (own, codec) in enumerate(setup.places)
        )  # each with its own `state`, `workers` and `error`
        self.dispatcher.replicas = self.replicas
        self._comparer = self.dispatcher.comparer = Comparer(setup.options, self.dispatcher)
        self._admission = Admission(self.dispatcher, storage, admit)
        self._is_started = False
        self._resumption = Resumption(self.outputs, setup, self.dispatcher, self._admission)

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or closed; ready as soon as one replica is."""
        return self.dispatcher.state

    @property
    def error(self) -> str | None:
        """Why a replica is restarting or has failed; None while all is well."""
        return next((str(replica.error) for replica in self.replicas if replica.error is not None), None)

    @property
    def stuck(self) -> str | None:
        """One sentence when a supervisor or the queue makes no headway and only a new process helps; None while all is well.
        Never waits."""
        stuck = [replica.name for replica in (*self.replicas, self._comparer) if replica.is_stuck]
        return f"the supervisor of {', '.join(stuck)} has not moved for {STUCK_S:.0f} s" if stuck else None

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """What each worker said when it was ready; with several replicas under "replica 1 rank 0"."""
        if self.num_replicas == 1:
            return self.replicas[0].workers
        return {f"{r.name} {name}": about for r in self.replicas for name, about in r.workers.items()}

    @property
    def dtype(self) -> str:
        return str(self._setup.options.engine.dtype)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers per rank."""
        return self._setup.placement.layers

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return self._setup.options.engine.threads or 1

    @property
    def text_encoder(self) -> str:
        """Where the text encoder is after encoding: keep, free or cpu."""
        return self._setup.placement.text_encoder

    # Life

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, wait: bool = True) -> Engine:
        """Start the workers; with `wait`, return when they are ready or raise what stopped them."""
        with self.dispatcher.changed:
            if self._is_started:
                raise EngineError("this engine has been started before; make a new one")
            self._is_started = True
            if self.team is not None:
                end_with_the_agent()
                self._listener = self.replicas[0].listener = HostListener(self.team)
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
        with self.dispatcher.changed:
            if not self.dispatcher.changed.wait_for(lambda: self.state in ("ready", "failed", "closed"), timeout):
                raise TimeoutError(f"the engine was not ready within {timeout} s")
            if self.state != "ready":
                raise self.dispatcher.failure()

    def close(self) -> None:
        """Stop what runs and end every process. Jobs that have not ended fail with `EngineError`; on disk they count as cut
        off, so that `recover` goes on with them. May be called twice."""
        with self.dispatcher.changed:
            self.dispatcher.is_closing = True
            self.dispatcher.changed.notify_all()  # replicas that pause before the next start
        for replica in (*self.replicas, self._comparer):
            replica.wake()
        for replica in (*self.replicas, self._comparer):
            replica.join()
        self.dispatcher.end_all(EngineError("the engine was closed before the job was done"), is_stored=False)
        if self._listener is not None:
            self._listener.close()
        self.dispatcher.store_owed(is_last=True)
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

    def host(self) -> int:
        """On torchrun's ranks other than 0, in place of `start`: run this rank's worker until rank 0 ends; the exit code."""
        assert self.team is not None and not self.team.is_front_end
        return host_rank(self.team, self._setup.options)

    _at_exit: Callable[[], None] | None = None
    _listener: HostListener | None = None

    # Jobs

    def resolve(self, request: GenerationRequest | Settings, preset: Preset | None = None) -> Settings:
        """`request` completed from `preset` (default: the engine's own) and checked against its limits; settings are complete
        as they are. A film that goes on from another has that one's size and rate. Raises `RequestError`."""
        if not isinstance(request, Settings):
            request = like_its_film(request, self.outputs)
        return self._setup.resolve(request, preset)

    def plan(self, request: GenerationRequest | Settings, *, is_short: bool = False) -> JobPlan:
        """What `request` needs of this engine's devices: bytes, and times once `plan --calibrate` has been run on them.

        `is_short` leaves the times out and is quick for any length. `.refusal` is what `submit` would say.
        """
        return self._setup.plan(request, is_short=is_short)

    def submit(
        self,
        request: GenerationRequest | Settings,
        *,
        owner: str = "",
        latents: Sequence[torch.Tensor] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        return_latents: bool = False,
        export_images: bool = False,
        job_id: str | None = None,
        take: Take | None = None,
    ) -> Job:
        """Queue a request and return at once; a `take` of it goes to its first look only.

        `latents`: initial noise per block, each [1, C, F, h, w]; `prompt_embeds`, `negative_prompt_embeds`: [1, tokens, text
        dim], used as they are. What `start_image` and `continue_from` name is read now.

        Raises `RequestError`, `QueueFull`, `OutputError`, or `EngineError` when closed or failed.
        """
        if take is None:
            check_one(request)
        settings = self.resolve(request)
        settings, files = with_beginning(settings, self.outputs, self.checkpoint.latent_sizes)
        settings, loras = self._setup.with_loras(settings)
        if (refusal := self.plan(settings, is_short=True).refusal) is not None:
            raise RequestError(refusal, "num_per_block")
        given = checked_tensors(
            settings, self.checkpoint, latents=latents, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        job_id = new_job_id() if job_id is None else check_job_id(job_id)
        self._admission.check(settings)
        self._check_open()
        with self._admission.taking(settings, owner, job_id):
            self._check_open()
            folder = create_job(
                self.outputs, job_id, settings, preset=self.preset.name, owner=owner, layers=self.layers,
                export_images=export_images, has_tensors=bool(given), begins_with=files,
                **({"take": dataclasses.asdict(take)} if take else {}), **self._setup.made_with(loras),
            )  # fmt: skip
            run = RunJob(
                folder.job_id, settings, str(folder.path), return_latents, export_images, given.latents, given.prompt_embeds,
                given.negative_prompt_embeds, loras=loras, take=take, rest_at=take.rest_at if take else 0,
            )  # fmt: skip
            return self._add_new(run, folder, owner)

    def submit_takes(self, request: GenerationRequest | Settings, takes: int, *, owner: str = "") -> list[Job]:
        """Queue `request` with so many seeds, its own and those after it: each runs to a first look and rests (it ends as
        `Cancelled` with `is_resting`); `resume` goes on with one, to the bits it would have had. All or none are taken. Raises
        as `submit`."""

        def submit(settings: Settings, job_id: str, take: Take) -> Job:
            return self.submit(settings, owner=owner, job_id=job_id, take=take)

        return submit_takes(self.resolve(request), takes, submit)

    @property
    def shelf(self) -> LoraShelf:
        """The LoRAs that requests may name."""
        return self._setup.shelf

    @property
    def can_compare(self) -> bool:
        """Whether `compare` takes jobs: not with options that change the layers' numbers."""
        return not self.changes().keys() & CHANGES_OF_LAYERS

    def compare(
        self, request: GenerationRequest | Settings, *, owner: str = "", export_images: bool = False, job_id: str | None = None
    ) -> Job:
        """Queue `request` for plain Wan: diffusers' `WanPipeline`, the whole video at once on the first rank's device.

        It runs in a process of its own as soon as this engine has nothing to do, or at once if it was not started. Raises as
        `submit` does.
        """
        settings = self.resolve(request)
        job_id = new_job_id() if job_id is None else check_job_id(job_id)
        check_plain(self.changes(), settings)
        if self._is_started:
            check_fits(self.plan(settings, is_short=True), self._setup.sizes, num_replicas=self.num_replicas)
        self._admission.check(settings)
        with self._admission.taking(settings, owner, job_id):
            self.dispatcher.check_open()
            folder = create_job(
                self.outputs, job_id, settings, preset=self.preset.name, owner=owner, baseline="wan",
                export_images=export_images, **{**self._setup.made_with(), "ranks": 1},
            )  # fmt: skip
            self._comparer.start()
            run = RunJob(folder.job_id, settings, str(folder.path), export_images=export_images, is_baseline=True)
            return self._add_new(run, folder, owner)

    def _add_new(self, run: RunJob, folder: JobFolder, owner: str) -> Job:
        try:
            return self._admission.queue(run, folder, owner)
        except DualParalError:  # the engine was closed meanwhile
            folder.delete()
            raise

    def changes(self) -> dict[str, Any]:
        """Options that change the numbers, as a job's record keeps them; empty for the model as it is."""
        return self._setup.options.engine.changes()

    def resume(self, job_id: str, *, return_latents: bool = False, anyway: bool = False) -> Job:
        """Queue a job of this outputs folder again that was interrupted, stopped or failed; it goes on from its last saved
        sweep and gives the bits it would have given; `anyway`: also if the model's or a LoRA's files were overwritten since.
        Raises `RequestError` when there is nothing to resume, and as `submit`."""
        return self._resumption.resume(job_id, return_latents=return_latents, anyway=anyway)

    def recover(self) -> list[Job]:
        """Queue again, the oldest first, what was waiting or running when the program last ended; returns these jobs.

        Call it once, before new jobs come. Jobs of other programs and of other models are left alone.
        """
        return self._resumption.recover()

    def job(self, job_id: str) -> Job | None:
        """A job of this run by id; older ones are on disk (`folder.find_job`, `facts.list_facts`)."""
        return self.dispatcher.get(job_id)

    def jobs(self) -> list[Job]:
        """Jobs that have not ended: those at work first, then the queue in the order they will run."""
        return self.dispatcher.jobs()

    def forget(self, job_id: str) -> None:
        """Drop an ended job from memory (its files stay). The oldest are dropped without being asked for."""
        self.dispatcher.forget(job_id)

    def _check_open(self) -> None:
        self.dispatcher.check_open()
        if not self._is_started:
            raise self.dispatcher.failure()


def _close_at_exit(engine: Engine) -> Callable[[], None]:
    """An engine that was never closed is closed when the interpreter ends."""
    known = weakref.ref(engine)

    def close() -> None:
        if (found := known()) is not None:
            found.close()

    atexit.register(close)
    return close
