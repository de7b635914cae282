"""Minute-long videos with Wan on several GPUs: block-wise denoising over a pipeline of stages.

with Engine("pocket", ranks=2) as engine:
    print(engine.submit(GenerationRequest(prompt="a red circle bouncing on a navy background")).result().path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GenerationRequest": "dualparal.request",
    "Settings": "dualparal.request",
    "Engine": "dualparal.engine.engine",
    "DualParalPipeline": "dualparal.pipeline",
    "Job": "dualparal.jobs.job",
    "JobResult": "dualparal.jobs.job",
    **dict.fromkeys(
        ("Event", "Queued", "Started", "Progress", "Look", "BlockReady", "Steered", "WrappedUp", "Interrupted", "Finished",
         "Failed", "Cancelled"),
        "dualparal.events",
    ),
    **dict.fromkeys(
        ("DualParalError", "RequestError", "PresetError", "CheckpointError", "EngineError", "QueueFull", "WorkerDied",
         "WorkerFailed", "OutOfMemory", "OutputError", "JobCancelled"), "dualparal.errors"
    ),
}  # fmt: skip

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine
    from dualparal.errors import (
        CheckpointError,
        DualParalError,
        EngineError,
        JobCancelled,
        OutOfMemory,
        OutputError,
        PresetError,
        QueueFull,
        RequestError,
        WorkerDied,
        WorkerFailed,
    )
    from dualparal.events import (
        BlockReady,
        Cancelled,
        Event,
        Failed,
        Finished,
        Interrupted,
        Look,
        Progress,
        Queued,
        Started,
        Steered,
        WrappedUp,
    )
    from dualparal.jobs.job import Job, JobResult
    from dualparal.pipeline import DualParalPipeline
    from dualparal.request import GenerationRequest, Settings


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that `import dualparal` costs nothing."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'dualparal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
