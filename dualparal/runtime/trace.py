"""A job's timeline as a Chrome trace: open it in Perfetto (ui.perfetto.dev) or chrome://tracing to see every stage's work.

Follows the Trace Event Format: complete events ("ph": "X") in microseconds, one thread row per stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualparal.runtime.messages import Span


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
