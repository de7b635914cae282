"""When each stage worked on what: kept while a job runs, and in its folder once it has ended, there also as a Chrome trace for
Perfetto (ui.perfetto.dev) or chrome://tracing.

The trace follows the Trace Event Format: complete events ("ph": "X") in microseconds, one thread row per stage.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualparal.files import write_atomically
from dualparal.messages import Span

log = logging.getLogger(__name__)
BUSY_WINDOW_S = 5.0
MAX_SPANS = 50_000  # the newest: a minute of video on eight ranks has 26,000
FILE, TRACE_FILE = "timeline.json", "trace.json"


class Timeline:
    """Spans in seconds since `start_s` of the monotonic clock. Thread-safe."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> tuple[Span, ...]:
        with self._lock:
            return tuple(self._spans)

    def add(self, spans: Sequence[Span]) -> None:
        """Note when stages worked, told by the monotonic clock."""
        with self._lock:
            self._spans += [span.later(-self._start_s) for span in spans]
            if len(self._spans) > MAX_SPANS:
                del self._spans[: len(self._spans) - MAX_SPANS // 2]

    def busy(self, stages: Sequence[str]) -> tuple[float, ...]:
        """Share of the last seconds in which each of these computed, 0-1."""
        since_s = time.monotonic() - self._start_s - BUSY_WINDOW_S
        worked = dict.fromkeys(stages, 0.0)
        with self._lock:
            for span in reversed(self._spans):
                if span.end_s < since_s - 2 * BUSY_WINDOW_S:
                    break
                if span.stage in worked:
                    worked[span.stage] += max(0.0, span.end_s - max(span.start_s, since_s))
        return tuple(min(1.0, seconds / BUSY_WINDOW_S) for seconds in worked.values())

    def store(self, folder: Path) -> None:
        """Move the spans to a job's folder; where a full disk does not take them, they stay here."""
        if not (spans := self.spans):
            return
        try:
            write_atomically(folder / FILE, json.dumps([asdict(span) for span in spans]))
            write_atomically(folder / TRACE_FILE, json.dumps(chrome_trace(spans)))
        except OSError as error:
            log.error("job %s: its timeline could not be stored: %s", folder.name, error, extra={"job_id": folder.name})
        else:
            with self._lock:
                self._spans = []  # large


def read_timeline(folder: Path) -> tuple[Span, ...]:
    """The spans stored in a job's folder; () when they are missing or damaged."""
    try:
        return _spans(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()


def _spans(found: Any) -> tuple[Span, ...]:
    """Spans from dictionaries, or a dictionary that holds them under `spans`."""
    if isinstance(found, dict):
        found = found.get("spans", ())
    return tuple(_span(**{name: record[name] for name in Span.__dataclass_fields__}) for record in found)


def _span(stage: Any, start_s: Any, end_s: Any, block: Any, step: Any) -> Span:
    if not isinstance(stage, str) or not all(math.isfinite(number) for number in (start_s, end_s, block, step)):
        raise ValueError(f"{stage!r} from {start_s} to {end_s} is no span")
    return Span(stage, float(start_s), float(end_s), int(block), int(step))


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """`spans` (seconds since submit) as a JSON-ready trace; rows are the stages in order, then text, decode, encode."""
    rows = sorted({span.stage for span in spans}, key=lambda name: (not name.startswith("stage "), name))
    names = [{"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}} for row, name in enumerate(rows)]
    work = [
        {
            "ph": "X",
            "name": f"block {span.block} step {span.step}" if span.stage.startswith("stage ") else f"block {span.block}",
            "cat": span.stage,
            "pid": 1,
            "tid": rows.index(span.stage),
            "ts": span.start_s * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"block": span.block, "step": span.step},
        }
        for span in spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *work]}
