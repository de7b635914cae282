"""Logs for people and for machines: plain lines, or one JSON object a line with worker and job.

    {"time": "2026-01-31T12:00:00.123Z", "level": "warning", "logger": "dualparal.ring.saved_sweeps", "worker": "rank 1",
     "job": "019b...-1c2d3e4f", "message": "..."}

A process that owns its standard streams (the server, its workers) logs whatever else is written to them too: Python's warnings,
errors that nobody caught, what libraries print. Code below Python that writes to the descriptors is not seen.
Prompts, tokens and keys are never logged by this package.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import sys
import threading
from typing import TextIO

log = logging.getLogger(__name__)
MARK = "  | "  # before every line of a traceback: no log line begins so
MAX_UNFINISHED = 10_000  # characters that may wait for the end of their line

_working_on: str | None = None


def set_up_logs(verbose: bool = False, as_json: bool = False, *, worker: str = "front end", owns_streams: bool = False) -> None:
    """Send this process's logs to standard error; `worker` names the process in every line. With `owns_streams` whatever else
    Python writes there is logged too, and as JSON also what it prints. Does nothing where logs have been set up already."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker) if as_json else PlainLines(worker))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if owns_streams:
        _take_streams(with_stdout=as_json)


def working_on(job_id: str | None) -> None:
    """Name the job this process works on; a worker has one at a time."""
    global _working_on
    _working_on = job_id


def _job_of(record: logging.LogRecord) -> str | None:
    found = getattr(record, "job_id", None)
    return found if isinstance(found, str) else _working_on


def _take_streams(*, with_stdout: bool) -> None:
    """Log what goes around the loggers: warnings, uncaught errors, and whatever is written to the standard streams."""
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical("the process ends", exc_info=(kind, error, trace))
    threading.excepthook = _thread_ended
    sys.unraisablehook = _could_not_raise
    sys.stderr = LoggedStream("stderr", logging.WARNING, sys.stderr)
    if with_stdout:
        sys.stdout = LoggedStream("stdout", logging.INFO, sys.stdout)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        name = ended.thread.name if ended.thread else "unknown"
        log.error("thread %s ends", name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback))


def _could_not_raise(found: sys.UnraisableHookArgs) -> None:
    trace = (found.exc_type, found.exc_value, found.exc_traceback) if found.exc_value is not None else None
    log.error("%s: %r", found.err_msg or "an exception is ignored in", found.object, exc_info=trace)


class LoggedStream(io.TextIOBase):
    """Stands for a standard stream: every line written to it becomes a line of the log. Never a terminal."""

    encoding = "utf-8"

    def __init__(self, name: str, level: int, stream: TextIO) -> None:
        self._log = logging.getLogger(name)
        self._level = level
        self._stream = stream
        self._thread = threading.local()  # lines of two threads never mix

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._thread, "rest", "") + text).split("\n")
        if len(rest) > MAX_UNFINISHED:
            lines, rest = [*lines, rest], ""
        self._thread.rest = rest
        for line in lines:
            self._tell(line)
        return len(text)

    def flush(self) -> None:
        rest, self._thread.rest = getattr(self._thread, "rest", ""), ""
        self._tell(rest)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def _tell(self, line: str) -> None:
        # Where logging itself complains here that it cannot write, there is nowhere left to say it.
        depth = getattr(self._thread, "depth", 0)
        if not line.strip() or depth:
            return
        self._thread.depth = depth + 1
        try:
            self._log.log(self._level, "%s", line)
        finally:
            self._thread.depth = depth


class PlainLines(logging.Formatter):
    """`time level [worker job] logger: message`, one line; a traceback follows, each line of it marked. Control characters
    from outside cannot forge a line or move the cursor."""

    def __init__(self, worker: str) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(who)s] %(name)s: %(message)s")
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        job = _job_of(record)
        record.who = f"{self._worker} job {job}" if job else self._worker
        record.message, record.asctime = record.getMessage(), self.formatTime(record)
        lines = [self.formatMessage(record)]
        if trace := _trace_of(self, record):
            lines += [MARK + line for line in trace.split("\n")]
        return "\n".join(printable(line, keep="\t") for line in lines)


def _trace_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """What a record tells of where it happened; "" if it does not."""
    error = formatter.formatException(record.exc_info) if record.exc_info else record.exc_text
    return "\n".join(filter(None, (error, record.stack_info)))


class JsonLines(logging.Formatter):
    """One JSON object a line, ASCII only; a traceback goes into `traceback`."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": record.levelname.lower(),
            "logger": record.name, "worker": self._worker, "job": _job_of(record), "message": record.getMessage(),
        }  # fmt: skip
        if trace := _trace_of(self, record):
            line["traceback"] = trace
        return json.dumps(line)


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with control and direction characters spelt out, so that it can be shown on a terminal."""
    return "".join(ch if ch.isprintable() or ch in keep else ch.encode("unicode_escape").decode() for ch in text)
