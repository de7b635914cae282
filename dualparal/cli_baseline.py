"""`generate --baseline wan`: the same request through diffusers' own pipeline, in a process of its own, for comparison."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from dualparal.errors import JobCancelled, RequestError, WorkerDied, error_from_wire
from dualparal.events import Cancelled, Failed, Finished
from dualparal.request import GenerationRequest
from dualparal.runtime.devices import place
from dualparal.runtime.journal import JobFolder


def run_baseline_job(
    engine: Any, request: GenerationRequest, job_id: str, *, device: str, text_encoder: str, export_images: bool
) -> Finished:
    """Run a resolved `request` on one device with the model, dtypes and outputs folder of `engine`, which is not started.

    Raises what the pipeline raised, as an error of ours, or `JobCancelled` on Ctrl-C.
    """
    changes = engine.changes()
    if changes.keys() & {"loras", "attention", "compile", "quantization"}:
        raise RequestError(
            "the baseline is diffusers as it is; leave --lora, --attention, --compile and --quantization out", "baseline"
        )
    devices, _ = place(device, 1)
    folder = JobFolder.create(
        engine.outputs, job_id, request, model=str(engine.checkpoint.folder), preset=engine.preset.name, ranks=1,
        dtype=engine.dtype, threads=engine.threads, export_images=export_images, baseline="wan", **changes,
    )  # fmt: skip
    command = [
        sys.executable, "-m", "dualparal.baseline", str(folder.path), "--device", devices[0], "--text_encoder", text_encoder,
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        folder.append(Cancelled(job_id=job_id))
        raise JobCancelled("the baseline was stopped; it shows nothing before its end") from None
    final = folder.final_event()
    if isinstance(final, Finished):
        return final
    if isinstance(final, Failed):
        raise error_from_wire(final.kind, final.message)
    raise WorkerDied(f"the baseline ended with exit code {code}" + (" (out of memory?)" if code == -9 else ""))
