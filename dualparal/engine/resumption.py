"""Jobs that go on: the one that is asked for, or all that were cut off when the program last ended."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from dualparal.engine.admission import Admission
from dualparal.engine.dispatcher import Dispatcher
from dualparal.engine.setup import EngineSetup
from dualparal.errors import DualParalError, RequestError
from dualparal.jobs.folder import JobFolder, find_job
from dualparal.jobs.job import Job
from dualparal.jobs.recovery import check_can_go_on, cut_off, warn_of_other_bits
from dualparal.jobs.takes import from_record as take_from_record
from dualparal.jobs.takes import has_rested
from dualparal.messages import RunJob
from dualparal.model.lora_shelf import from_record

log = logging.getLogger(__name__)


class Resumption:
    """Queues jobs of an outputs folder again."""

    def __init__(self, outputs: Path, setup: EngineSetup, dispatcher: Dispatcher, admission: Admission) -> None:
        self._outputs, self._setup, self._dispatcher, self._admission = outputs, setup, dispatcher, admission
        self._lock = threading.Lock()  # two that resume one job at once

    def resume(self, job_id: str, *, return_latents: bool, anyway: bool) -> Job:
        """See `Engine.resume`."""
        folder = find_job(self._outputs, job_id)
        self._check(folder, anyway)  # before anything is deleted for it
        with self._admission.taking(folder.request(), str(folder.record().get("owner", "")), job_id):
            return self._go_on(folder, return_latents, anyway)

    def recover(self) -> list[Job]:
        """See `Engine.recover`."""
        found = []
        for folder in cut_off(self._outputs):
            try:
                take = take_from_record(folder.record())
                rest_at = take.rest_at if take is not None and not has_rested(folder.events()) else 0
                found.append(self._go_on(folder, rest_at=rest_at))
            except DualParalError as error:
                log.warning("job %s is left as it is: %s", folder.job_id, error, extra={"job_id": folder.job_id})
        return found

    def _check(self, folder: JobFolder, anyway: bool) -> None:
        self._dispatcher.check_open()
        known = self._dispatcher.get(folder.job_id)
        if known is not None and not known.has_ended:
            raise RequestError(f"job {folder.job_id} has not ended; there is nothing to resume", "job_id")
        loras = from_record(folder.record().get("with_loras"))
        check_can_go_on(folder, self._setup.made_with(loras), anyway=anyway)
        self._setup.resolve(folder.request())

    def _go_on(self, folder: JobFolder, return_latents: bool = False, anyway: bool = False, *, rest_at: int = 0) -> Job:
        with self._lock:
            self._check(folder, anyway)
            record = folder.record()
            loras = from_record(record.get("with_loras"))
            warn_of_other_bits(folder, self._setup.made_with(loras))
            folder.forget_stop()
            run = RunJob(
                folder.job_id, folder.request(), str(folder.path), return_latents, bool(record.get("export_images")),
                is_resumed=True, loras=loras, take=take_from_record(record), rest_at=rest_at,
            )  # fmt: skip
            return self._admission.queue(run, folder, str(record.get("owner", "")))
