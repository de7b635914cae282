"""`generate --baseline wan`: the same request through diffusers' own pipeline, in a process of its own, for comparison."""

from __future__ import annotations

import subprocess
from typing import Any

from dualparal.errors import JobCancelled, WorkerDied, error_from_wire
from dualparal.events import Cancelled, Failed, Finished
from dualparal.request import GenerationRequest
from dualparal.runtime.baseline_lane import baseline_command, make_baseline_folder
from dualparal.runtime.claim import claim
from dualparal.runtime.devices import place


def run_baseline_job(
    engine: Any, request: GenerationRequest, job_id: str, *, device: str, text_encoder: str, export_images: bool
) -> Finished:
    """Run a resolved `request` on one device with the model, dtypes and outputs folder of `engine`, which is not started.

    Raises what the pipeline raised, as an error of ours, or `JobCancelled` on Ctrl-C.
    """
    devices, _ = place(device, 1)
    folder = make_baseline_folder(engine, request, job_id, export_images=export_images)
    held = claim(folder)
    process = subprocess.Popen(
        [*baseline_command(folder.path, devices[0], text_encoder), "--with_stdin"], stdin=subprocess.PIPE
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        folder.append(Cancelled(job_id=job_id))
        raise JobCancelled("the baseline was stopped; it shows nothing before its end") from None
    finally:
        assert process.stdin is not None
        process.stdin.close()
        held.release()
    final = folder.final_event()
    if isinstance(final, Finished):
        return final
    if isinstance(final, Failed):
        raise error_from_wire(final.kind, final.message)
    raise WorkerDied(f"the baseline ended with exit code {code}" + (" (out of memory?)" if code == -9 else ""))
