"""The timeline as a Chrome trace: every span once, stages as rows in order, microseconds."""

from __future__ import annotations

import json

from dualparal.jobs.timeline import chrome_trace
from dualparal.messages import Span


def test_every_span_once_on_its_stage_s_row() -> None:
    spans = [
        Span("stage 1", 1.0, 1.5, 3, 2), Span("decode", 2.0, 2.25, 0, 0), Span("stage 0", 0.5, 1.0, 3, 2),
        Span("text", 0.0, 0.1, 0, 0),
    ]  # fmt: skip
    trace = json.loads(json.dumps(chrome_trace(spans)))
    rows = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert [rows[tid] for tid in sorted(rows)] == ["stage 0", "stage 1", "decode", "text"]
    work = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found = {(rows[event["tid"]], event["ts"], event["dur"], event["args"]["block"], event["args"]["step"]) for event in work}
    assert found == {(s.stage, s.start_s * 1e6, (s.end_s - s.start_s) * 1e6, s.block, s.step) for s in spans}
    assert len(work) == len(spans)
