"""Every error a caller can meet, as one tree.

A message says what happened, the value, the limit and the way out, in one sentence fit for a page.
"""

from __future__ import annotations


class DualParalError(Exception):
    """Root of all errors raised by this package."""


class RequestError(DualParalError, ValueError):
    """A value in a request is not usable.

    `field` names the field of `GenerationRequest` (or of a preset) at fault, when there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (str(self), self.field)


class PresetError(DualParalError, ValueError):
    """A preset file has an unknown key, a bad value, or does not exist."""


class CheckpointError(DualParalError):
    """A model folder is missing, incomplete, damaged, or not a Wan text-to-video model."""


class EngineError(DualParalError):
    """The engine cannot do what was asked in its present state (closed, starting failed, queue full)."""


class QueueFull(EngineError):
    """The queue holds as many jobs as it may; nothing was queued."""


class WorkerDied(EngineError):
    """A worker process ended or stopped answering while it was needed."""


class WorkerFailed(EngineError):
    """A worker raised an error; the message carries its one-sentence cause."""


class OutOfMemory(WorkerFailed):
    """A device or the host ran out of memory while running a job."""


class NotFinite(DualParalError):
    """The model predicted NaN or infinite numbers: nothing of the video can be used from there on."""


class OutputError(DualParalError, OSError):
    """Results cannot be written: folder not writable, disk full."""


class JobCancelled(DualParalError):
    """The job was stopped; `path` is the playable mp4 of the finished blocks, or None if none was finished."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (str(self), self.path)


def error_from_wire(kind: str, message: str) -> DualParalError:
    """Rebuild an error that crossed a process border as (class name, message); unknown kinds become `WorkerFailed`."""
    cls = globals().get(kind)
    if isinstance(cls, type) and issubclass(cls, DualParalError):
        return cls(message)
    return WorkerFailed(message)
