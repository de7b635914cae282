"""Logs for people and for machines: plain lines, or one JSON object a line with worker and job.

    {"time": "2026-01-31T12:00:00.123Z", "level": "warning", "logger": "dualparal.runtime.state", "worker": "rank 1",
     "job": "019b...-1c2d3e4f", "message": "..."}

Prompts, tokens and keys are never logged by this package.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys

_working_on: str | None = None


def set_up_logs(verbose: bool = False, as_json: bool = False, *, worker: str = "front end") -> None:
    """Send this process's logs to standard error; `worker` names the process in every line. Does nothing
    where somebody else has set up logs already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker) if as_json else PlainLines(worker))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def working_on(job_id: str | None) -> None:
    """Name the job this process works on; a worker has one at a time."""
    global _working_on
    _working_on = job_id


def _job_of(record: logging.LogRecord) -> str | None:
    found = getattr(record, "job_id", None)
    return found if isinstance(found, str) else _working_on


class PlainLines(logging.Formatter):
    """`time level [worker job] logger: message`. Control characters from outside cannot forge a line or move the cursor."""

    def __init__(self, worker: str) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(who)s] %(name)s: %(message)s")
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        job = _job_of(record)
        record.who = f"{self._worker} job {job}" if job else self._worker
        return printable(super().format(record))


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
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with control and direction characters spelt out, so that it can be shown on a terminal."""
    return "".join(ch if ch.isprintable() or ch in keep else ch.encode("unicode_escape").decode() for ch in text)
