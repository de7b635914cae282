"""What an engine is made of, checked before anything starts: the model, the workers' options, which rank is where, and from
that what a request needs.

Nothing here starts a process or holds a job; needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualparal.devices import bytes_per_device, check_dtype, is_on_gpu, place, place_hosts
from dualparal.errors import RequestError
from dualparal.hosts.torchrun import Team, settle_ranks
from dualparal.limits import default_threads
from dualparal.media.ffmpeg import check_ffmpeg
from dualparal.messages import WorkerOptions
from dualparal.method.grid import Grid
from dualparal.method.rules import check_halves
from dualparal.model.attention_backends import check_attention
from dualparal.model.fingerprint import fingerprints, of_loras
from dualparal.model.known import sizes_of
from dualparal.model.lora_file import check_loras
from dualparal.model.lora_shelf import LoraShelf, as_record, spec_of
from dualparal.model.lora_source import Lora, find_loras
from dualparal.model.part_shapes import transformer_shapes
from dualparal.model.source import find_checkpoint
from dualparal.options import AUTO_SPLIT, EngineOptions
from dualparal.planning.calibration import cache_folder, load_speed
from dualparal.planning.job_plan import JobPlan, fastest_layers, plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.placement import Placement, Speed
from dualparal.planning.proposals import first_proposal
from dualparal.planning.room import settle
from dualparal.planning.sizes import DiTSizes
from dualparal.presets import FLOW_SHIFT, USUAL, Preset, find_preset, model_name, weights_of
from dualparal.request import MAX_LORAS, GenerationRequest, Settings

log = logging.getLogger(__name__)
KNOWN_PLANS = 32
UNPLANNED = {"prompt": "", "negative_prompt": "", "seed": 0}  # no plan depends on these


class EngineSetup:
    """`options` of every worker; `places[r]`, replica r's devices and its codec's; `placement`, `sizes`: the plan's."""

    def __init__(self, model: str | Path, preset: Preset | None, asked: EngineOptions, team: Team | None) -> None:
        """Arguments and errors are those of `Engine`."""
        self._short_plans = functools.lru_cache(KNOWN_PLANS)(self._plan_short)
        check_ffmpeg()  # both before a download
        check_attention(asked.attention, on_gpu=is_on_gpu(asked.device))
        self.preset = preset or find_preset(str(model))
        weights, revision = weights_of(str(model), self.preset)
        self.checkpoint, self.model = find_checkpoint(weights, revision), model_name(weights)  # as settings name it
        if self.preset.flow_shift is None:  # what the page shows is what is used
            shift = self.checkpoint.flow_shift or FLOW_SHIFT
            self.preset = self.preset.model_copy(update={"flow_shift": shift})
        self.num_experts = self.checkpoint.num_experts
        self.ranks, self.num_replicas, self.team = settle_ranks(team, asked.ranks, asked.replicas), asked.replicas, team
        counts = None if isinstance(asked.layer_split, str) else asked.layer_split
        self.grid = Grid.of(self.ranks, asked.guidance_parallel)
        layers = split_layers(self.checkpoint.num_layers, self.grid.stages, counts)
        local_ranks = team.local_ranks if team else self.ranks  # on this host
        self.places = [
            place_hosts(asked.device, self.ranks, local_ranks)
            if team
            else place(asked.device, self.ranks, replica, asked.replicas)
            for replica in range(asked.replicas)
        ]
        devices, codec_device = self.places[0]
        on_gpu = devices[0] != "cpu"
        asked.check_places(on_gpu=on_gpu)
        loras = find_loras(asked.loras, self.num_experts)
        settled = asked.settled(
            ranks=self.ranks, device="cuda" if on_gpu else "cpu", loras=tuple(lora.label for lora in loras),
            dtype=asked.dtype or (self.preset.dtype if on_gpu else "float32"),
            vae_dtype=asked.vae_dtype or self.preset.vae_dtype,
            threads=asked.threads or default_threads(local_ranks * asked.replicas),
        )  # fmt: skip
        shapes = transformer_shapes(self.checkpoint.config("transformer"))
        check_loras(loras, self.num_experts, shapes)
        self.shelf = LoraShelf(asked.lora_folder, self.num_experts, shapes)
        self._compiles = asked.compile
        if on_gpu:
            check_dtype(str(settled.dtype))
        self.find_loras(self.preset.loras)  # downloaded now rather than with the first video
        self.files = fingerprints(self.checkpoint, loras)  # now, as they are about to be loaded
        self.sizes = dataclasses.replace(sizes_of(self.checkpoint), lora_elements=self.shelf.elements)
        self.placement = Placement.of(
            settled, layers=tuple(len(stage) for stage in layers), bytes_per_device=bytes_per_device(settled.device),
            codec_rank=devices.index(codec_device) if on_gpu and codec_device in devices else None,
        )  # fmt: skip
        if asked.layer_split == AUTO_SPLIT:
            layers = self._split_for_speed()
        self.options = WorkerOptions(
            settled.settled(text_encoder=self._settle_text_encoder()), str(self.checkpoint.folder),
            layers * self.grid.guidance, devices, codec_device, loras, str(cache_folder() / "text"),
        )  # fmt: skip

    def resolve(self, request: GenerationRequest | Settings, preset: Preset | None = None) -> Settings:
        """`request` completed from `preset` (default: the engine's own), the checkpoint and, where it is left open, what these
        devices have room for; checked against the preset's limits. Settings are complete as they are, if these ranks can run
        them so. Raises `RequestError`."""
        if isinstance(request, Settings):
            check_halves(request, self.grid.guidance)
            return request
        is_away = self.placement.is_cache_offloaded
        return settle(
            request, preset or self.preset, self.sizes, self.placement, model=self.model,
            boundary_ratio=self.checkpoint.boundary_ratio, flow_shift=self.checkpoint.flow_shift,
            speed=self.speed if is_away else None, host_bytes=bytes_per_device("cpu") if is_away else None,
        )  # fmt: skip

    def find_loras(self, specs: Sequence[str]) -> tuple[Lora, ...]:
        """The LoRAs of a request. Raises `RequestError` for those that cannot be used here."""
        if specs and self._compiles:
            raise RequestError("loras of a video do not go with --compile; give them to the engine with --lora", "loras")
        return self.shelf.find(specs)

    def with_loras(self, settings: Settings) -> tuple[Settings, tuple[Lora, ...]]:
        """`settings` that name their LoRAs without telling where they lie, and the files. Raises `RequestError`."""
        loras = self.find_loras(settings.loras)
        if len(loras) > MAX_LORAS:
            raise RequestError(f"loras are {len(loras)} files; a video takes at most {MAX_LORAS}", "loras")
        return settings.model_copy(update={"loras": tuple(spec_of(lora) for lora in loras)}), loras

    def plan(self, request: GenerationRequest | Settings, *, is_short: bool = False) -> JobPlan:
        """What `request` needs of this engine's devices: bytes, and times once `plan --calibrate` has been run on them.

        `is_short` leaves the times out and is quick for any length, and at once for settings that differ from others of late
        in prompts and seed only. `.refusal` is what `submit` would say.
        """
        settings = self.resolve(request)
        if not is_short:
            return self._with_way_out(plan_job(settings, self.sizes, self.placement, speed=self.speed))
        return dataclasses.replace(self._short_plans(settings.model_copy(update=UNPLANNED), self.placement), request=settings)

    def _plan_short(self, settings: Settings, placement: Placement) -> JobPlan:
        return self._with_way_out(plan_job(settings, self.sizes, placement, is_short=True))

    def _with_way_out(self, plan: JobPlan) -> JobPlan:
        if plan.refusal is not None and (way := first_proposal(plan.request, self.sizes, self.placement)) is not None:
            plan = dataclasses.replace(plan, way_out=way.flags)
        return plan

    def _settle_text_encoder(self) -> str:
        """Settle `text_encoder="auto"`, for the preset's own video; kept in the placement, and said in the log."""
        asked = self.placement.text_encoder
        self.placement = settle_text_encoder(self.resolve(USUAL), self.sizes, self.placement)
        if asked != self.placement.text_encoder:
            log.info("text_encoder=%s: %s", asked, self.placement.text_encoder)
        return self.placement.text_encoder

    @property
    def speed(self) -> Speed | None:
        placement = self.placement
        return load_speed("cuda" if placement.on_gpu else "cpu", placement.dtype, DiTSizes.of(self.sizes.config).dim)

    def _split_for_speed(self) -> tuple[range, ...]:
        """Settle `layer_split="auto"`, for the preset's own video. Other hosts leave it to rank 0 and are told."""
        if self.team is not None and not self.team.is_front_end:
            return ()
        speed, request = self.speed, self.resolve(USUAL)
        counts = fastest_layers(request, self.sizes, self.placement, speed)
        self.placement = dataclasses.replace(self.placement, layers=counts)
        by = "measured times" if speed else "FLOPs (plan --calibrate measures this host)"
        log.info("layer_split=auto: %s layers per rank, by %s", ",".join(map(str, counts)), by)
        return split_layers(self.checkpoint.num_layers, self.grid.stages, counts)

    def made_with(self, loras: Sequence[Lora] = ()) -> dict[str, Any]:
        """What a job's record says of the engine that makes it, as far as bits depend on it, and of the job's own `loras`."""
        try:
            files = self.files | of_loras(loras)
        except OSError as error:
            raise RequestError(f"loras: {Path(error.filename).name} cannot be read: {error.strerror}", "loras") from None
        own = {"with_loras": as_record(loras)} if loras else {}
        return {"model": str(self.checkpoint.folder), "files": files, **own, **self.options.engine.record()}
