"""Plain Wan for comparison: what a request for it must fulfil, and the supervisor of its worker.

A comparison waits until none of the engine's own jobs is at work; those submitted later do not wait for it. It holds the whole
model once more (on a GPU it needs room beside the first rank), so its worker is started for one job and ends with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dualparal.engine.dispatcher import Dispatcher
from dualparal.engine.replica import Replica
from dualparal.engine.worker_group import BaselineGroup, WorkerGroup
from dualparal.errors import DualParalError, RequestError
from dualparal.jobs.ending import end_surely
from dualparal.jobs.job import Job
from dualparal.messages import WorkerOptions
from dualparal.planning.job_plan import JobPlan, plan_job
from dualparal.planning.memory_table import gigabytes
from dualparal.planning.placement import ModelSizes
from dualparal.request import Settings

CHANGES_OF_LAYERS = {"loras", "attention", "compile", "quantization"}
LOOK_EVERY_S = 0.3
STEP_TIMEOUT_S = 3600.0  # one step over all of a long video takes tens of minutes


class Comparer(Replica):
    """Makes one comparison after another, each with a worker of its own."""

    def __init__(self, options: WorkerOptions, dispatcher: Dispatcher) -> None:
        """`options` are those of the engine's workers; the first rank's device is taken."""
        alone = dataclasses.replace(
            options, layers=(), devices=options.devices[:1], codec_device=options.devices[0],
            engine=options.engine.settled(timeout_s=max(STEP_TIMEOUT_S, options.engine.timeout_s), worker_hook=None),
            listen_address=None,
        )  # fmt: skip
        super().__init__("comparisons", alone, dispatcher)
        self._given: Job | None = None  # to the worker

    def start(self) -> None:
        """Watch for comparisons from now on; may be called again."""
        if self._thread is None:
            super().start()

    def _live(self) -> None:
        if self._dispatcher.next_comparison(self) is None:
            self._pause(LOOK_EVERY_S)
        else:
            self._run_group(BaselineGroup, grace_s=0.0)

    def _serve(self, group: WorkerGroup, *, is_ready: bool) -> bool:
        if (job := self.at_rank_0) is not None and job is not self._given:
            self._given = job
            group.requests.put(job.run)
        return bool(self.at_work()) and not self._to_stop

    def _end_jobs(self, error: DualParalError) -> None:
        for job in self.let_go():  # there are no saved sweeps to go on from
            end_surely(job, error)


NOT_PLAIN = {  # field of a request: what plain Wan cannot be asked for
    "shots": "plain Wan takes one prompt; compare a film without shots",
    "start_image": "plain Wan takes no picture; compare a film that begins without one",
    "loras": "plain Wan is compared as it is; compare a video without LoRAs",
    "is_endless": "plain Wan makes no endless film; compare one that has an end",
    "continue_from": "plain Wan continues no film; compare one that begins by itself",
}


def why_not_plain(request: Settings) -> RequestError | None:
    """Why plain Wan cannot be asked for the same video; None where it can."""
    found = next((field for field in NOT_PLAIN if getattr(request, field)), None)
    return None if found is None else RequestError(NOT_PLAIN[found], found)


def check_plain(changes: Mapping[str, Any], request: Settings) -> None:
    """Raise `RequestError` when an engine with these `changes` cannot be compared with diffusers as it is, or `request` is for
    what plain Wan does not do."""
    if changes.keys() & CHANGES_OF_LAYERS:
        raise RequestError(
            "the baseline is diffusers as it is; leave --lora, --attention, --compile and --quantization out", "baseline"
        )
    if (refusal := why_not_plain(request)) is not None:
        raise refusal


def check_fits(plan: JobPlan, sizes: ModelSizes, *, num_replicas: int = 1) -> None:
    """Raise `RequestError` when plain Wan has no room for the request of `plan` beside the engine's own work, which may begin
    at any time: the whole model on one device, the whole video as one block."""
    request, placement = plan.request, plan.placement
    whole = request.model_copy(
        update={
            "num_per_block": request.latents_num, "num_cat": 0, "schedule": "paper", "context": "recomputed",
            "micro_batches": False,
        }
    )  # fmt: skip
    alone = dataclasses.replace(
        placement, layers=(sum(placement.layers),), guidance=1, codec_rank=0, is_offloaded=False, is_cache_offloaded=False
    )
    needed, have = plan_job(whole, sizes, alone, is_short=True).bytes_per_rank, placement.bytes_per_device
    held = plan.memory.ranks[0].total if placement.on_gpu else plan.bytes_in_all * num_replicas
    if have is not None and needed + held > have:
        raise RequestError(
            f"plain Wan makes the whole video at once and needs {gigabytes(needed)} beside the engine's {gigabytes(held)}; "
            f"there are {gigabytes(have)}: compare a shorter video or a smaller picture",
            "latents_num",
        )
