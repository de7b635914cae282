"""What an engine is made of, checked before anything starts: the model, the workers' options, which rank is where, and from
that what a request needs.

Nothing here starts a process or holds a job; needs no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualparal.core.job_plan import JobPlan, fastest_layers, plan_job, settle_text_encoder
from dualparal.core.placement import Placement, Speed
from dualparal.core.proposals import first_proposal
from dualparal.core.rules import settle_rules
from dualparal.core.sizes import DiTSizes
from dualparal.errors import RequestError
from dualparal.model.attention_backends import check_attention
from dualparal.model.known import sizes_of
from dualparal.model.layout import split_layers
from dualparal.model.lora_source import find_loras
from dualparal.model.source import find_model
from dualparal.presets import Preset
from dualparal.request import GenerationRequest
from dualparal.runtime.calibration import cache_folder, load_speed
from dualparal.runtime.devices import bytes_per_device, is_on_gpu, place, place_hosts
from dualparal.runtime.engine_options import (
    changes_of,
    check_offload,
    check_offload_cache,
    check_quantization,
    check_text_encoder,
    dtype_name,
    layer_counts,
)
from dualparal.runtime.messages import WorkerOptions
from dualparal.runtime.torchrun import Team, settle_ranks

log = logging.getLogger(__name__)


class Equipment:
    """`options` of every worker; `places[r]`, replica r's devices and its codec's; `placement`, `sizes`: the plan's."""

    def __init__(
        self,
        model: str | Path,
        preset: Preset | None,
        *,
        ranks: int,
        replicas: int,
        device: str,
        dtype: str | None,
        layer_split: Sequence[int] | str | None,
        threads: int | None,
        timeout_s: float,
        verbose: bool,
        log_json: bool,
        worker_hook: str | None,
        attention: str | None,
        compile: bool,
        quantization: str | None,
        offload: bool,
        offload_cache: bool,
        vae_dtype: str | None,
        text_encoder: str,
        loras: Sequence[str],
        team: Team | None,
    ) -> None:
        """Arguments and errors are those of `Engine`."""
        check_quantization(quantization)  # both before a download
        check_attention(attention, on_gpu=is_on_gpu(device))
        self.preset, self.checkpoint = find_model(str(model), preset)
        self.num_experts = self.checkpoint.num_experts
        ranks = settle_ranks(team, ranks, replicas)
        self.ranks, self.num_replicas, self.team = ranks, replicas, team
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise RequestError(f"ranks={ranks!r} is not a number of processes; use 1 or more", "ranks")
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1:
            raise RequestError(f"replicas={replicas!r} is not a number of worker groups; use 1 or more", "replicas")
        counts = layer_counts(layer_split)
        layers = split_layers(self.checkpoint.num_layers, ranks, None if isinstance(counts, str) else counts)
        local_ranks = team.local_ranks if team else ranks  # on this host
        self.places = [
            place_hosts(device, ranks, local_ranks) if team else place(device, ranks, replica, replicas)
            for replica in range(replicas)
        ]
        devices, codec_device = self.places[0]
        name = dtype_name(dtype, "float32" if devices[0] == "cpu" else self.preset.dtype, "dtype")
        vae_dtype = dtype_name(vae_dtype, self.preset.vae_dtype, "vae_dtype")
        if threads is not None and threads < 1:
            raise RequestError(f"threads={threads} is not a number of threads; use 1 or more", "threads")
        self.options = WorkerOptions(
            folder=str(self.checkpoint.folder), layers=layers, devices=devices, codec_device=codec_device,
            dtype=name, threads=threads or max(1, (os.cpu_count() or 1) // (local_ranks * replicas)), timeout_s=timeout_s,
            verbose=verbose, log_json=log_json, worker_hook=worker_hook, attention=attention, is_compiled=compile,
            vae_dtype=vae_dtype, text_encoder=check_text_encoder(text_encoder), text_cache=str(cache_folder() / "text"),
            loras=find_loras(loras, self.num_experts), quantization=check_quantization(quantization),
            is_offloaded=check_offload(
                offload, on_gpu=devices[0] != "cpu", quantization=quantization, is_compiled=compile
            ),
            is_cache_offloaded=check_offload_cache(offload_cache, on_gpu=devices[0] != "cpu"),
        )  # fmt: skip
        self.sizes = sizes_of(self.checkpoint)
        self.placement = Placement(
            layers=tuple(len(stage) for stage in layers), dtype=name, vae_dtype=vae_dtype, text_encoder=text_encoder,
            quantization=quantization, is_offloaded=offload, is_cache_offloaded=offload_cache,
            codec_rank=devices.index(codec_device) if devices[0] != "cpu" and codec_device in devices else None,
            on_gpu=devices[0] != "cpu", bytes_per_device=bytes_per_device(devices[0].partition(":")[0]),
        )  # fmt: skip
        if isinstance(counts, str):
            self.options = dataclasses.replace(self.options, layers=self._split_for_speed())
        self.options = dataclasses.replace(self.options, text_encoder=self._settle_text_encoder())

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """`request` with every field filled, checked against the preset's limits; raises `RequestError`."""
        resolved = request.resolve(self.preset, num_experts=self.num_experts, boundary_ratio=self.checkpoint.boundary_ratio)
        return settle_rules(resolved, self.ranks)

    def plan(self, request: GenerationRequest, *, is_short: bool = False) -> JobPlan:
        """What `request` needs of this engine's devices: bytes, and times once `plan --calibrate` has been run on them.

        `is_short` leaves the times out and is quick for any length. `.refusal` is what `submit` would say.
        """
        plan = plan_job(self.resolve(request), self.sizes, self.placement, speed=self.speed, is_short=is_short)
        if plan.refusal is not None and (way := first_proposal(plan.request, self.sizes, self.placement)) is not None:
            plan = dataclasses.replace(plan, way_out=way.flags)
        return plan

    def _settle_text_encoder(self) -> str:
        """Settle `text_encoder="auto"`, for the preset's own video; kept in the placement, and said in the log."""
        asked = self.placement.text_encoder
        self.placement = settle_text_encoder(self.resolve(GenerationRequest(prompt="")), self.sizes, self.placement)
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
        speed, request = self.speed, self.resolve(GenerationRequest(prompt=""))
        counts = fastest_layers(request, self.sizes, self.placement, speed)
        self.placement = dataclasses.replace(self.placement, layers=counts)
        by = "measured times" if speed else "FLOPs (plan --calibrate measures this host)"
        log.info("layer_split=auto: %s layers per rank, by %s", ",".join(map(str, counts)), by)
        return split_layers(self.checkpoint.num_layers, self.ranks, counts)

    def made_with(self) -> dict[str, Any]:
        """What a job's record says of the engine that makes it, as far as bits depend on it."""
        return {
            "model": str(self.checkpoint.folder), "dtype": self.options.dtype, "threads": self.options.threads,
            "device": "cuda" if self.placement.on_gpu else "cpu", **changes_of(self.options),
        }  # fmt: skip
