"""Metrics that Prometheus can read, and logs that a machine can read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dualparal.engine.engine import Engine
from dualparal.engine.metrics import metrics_text
from dualparal.engine.tally import FIRST_FRAMES_BUCKETS_S
from dualparal.errors import WorkerDied
from dualparal.logs import printable, set_up_logs, working_on
from tests.engine.test_serving import SECONDS, until, wants
from tests.fake_group import HALF_THE_FRAMES, NUM_FRAMES, GroupLog, fake_groups

SAMPLE = re.compile(r'(dualparal_[a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (NaN|[-+0-9.e]+)')


def samples(text: str) -> dict[str, float]:
    """Every sample by name and labels; checks the format line by line."""
    found: dict[str, float] = {}
    typed: set[str] = set()
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in typed, f"{name} is told twice"
            typed.add(name)
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert any(match[1].startswith(name) for name in typed), line
            key = f"{match[1]}{{{match[2]}}}" if match[2] else match[1]
            assert key not in found, line
            found[key] = float(match[3])
    return found


@pytest.fixture
def group_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupLog]:
    with fake_groups(monkeypatch) as found:
        yield found


def test_metrics_follow_a_day(tiny: Path, tmp_path: Path, group_log: GroupLog) -> None:
    engine = Engine(tiny, device="cpu", outputs=tmp_path / "outputs", replicas=2, auto_resume=True)
    before = samples(metrics_text(engine))
    assert before['dualparal_engine_state{state="closed"}'] == 1 and before["dualparal_jobs_submitted_total"] == 0
    with engine:
        until(lambda: all(replica.state == "ready" for replica in engine.replicas))
        for prompt in ("one", "die once", "two"):
            engine.submit(wants(prompt)).result(SECONDS)
        slow = [engine.submit(wants("slow")) for _ in range(3)]
        until(lambda: sum(job.state == "running" for job in slow) == 2)
        now = samples(metrics_text(engine))
        slow[2].cancel()
        group_log.let_go.set()
        for job in slow[:2]:
            job.result(SECONDS)
        until(lambda: sum(engine.dispatcher.tally.ends.values()) == 6)
        after = samples(metrics_text(engine))
    assert now['dualparal_jobs{state="running"}'] == 2 and now['dualparal_jobs{state="queued"}'] == 1
    assert now["dualparal_queue_length"] == 1 and now['dualparal_engine_state{state="ready"}'] == 1
    assert after["dualparal_jobs_submitted_total"] == 6 and after["dualparal_jobs_interrupted_total"] == 1
    assert after['dualparal_jobs_ended_total{state="finished"}'] == 5
    assert after['dualparal_jobs_ended_total{state="cancelled"}'] == 1
    assert after["dualparal_frames_total"] == 5 * NUM_FRAMES
    assert after["dualparal_first_frames_seconds_count"] == 5 == after['dualparal_first_frames_seconds_bucket{le="+Inf"}']
    buckets = [after[f'dualparal_first_frames_seconds_bucket{{le="{limit}"}}'] for limit in FIRST_FRAMES_BUCKETS_S]
    assert buckets == sorted(buckets)
    assert after['dualparal_worker_restarts_total{replica="0"}'] + after['dualparal_worker_restarts_total{replica="1"}'] == 1
    assert after['dualparal_worker_resident_bytes{replica="",worker="front end"}'] > 2**20
    assert after['dualparal_stage_busy_ratio{replica="1",stage="0"}'] == 0
    assert after["dualparal_disk_free_bytes"] > 0
    assert after['dualparal_worker_resident_bytes{replica="0",worker="codec"}'] == 2**20, "as the worker says"


def test_frames_of_a_resumed_job_are_counted_once(tiny: Path, tmp_path: Path, group_log: GroupLog) -> None:
    with Engine(tiny, device="cpu", outputs=tmp_path / "outputs") as engine:
        first = engine.submit(wants("die once"))
        with pytest.raises(WorkerDied):
            first.result(SECONDS)
        until(lambda: samples(metrics_text(engine))["dualparal_frames_total"] == HALF_THE_FRAMES)
        assert engine.resume(first.id).result(SECONDS).num_frames == NUM_FRAMES
        until(lambda: samples(metrics_text(engine))["dualparal_frames_total"] == NUM_FRAMES)


# Logs


@contextmanager
def own_logs(**options: Any) -> Iterator[None]:
    """As in a fresh process; pytest's handlers come back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    set_up_logs(**options)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    working_on(None)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with own_logs(as_json=True, worker="rank 1"):
        log = logging.getLogger("dualparal.test")
        log.info("quiet")
        working_on("abcdef")
        log.warning("forged\n%s", '{"level": "error"}\x1b[2J')
        log.warning("another job", extra={"job_id": "123456"})
        try:
            raise ValueError("é")
        except ValueError:
            log.exception("failed")
    written = capsys.readouterr().err
    found = [json.loads(line) for line in written.splitlines()]
    assert [(one["level"], one["worker"], one["job"]) for one in found] == [
        ("warning", "rank 1", "abcdef"), ("warning", "rank 1", "123456"), ("error", "rank 1", "abcdef"),
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found[0]["time"])
    assert "ValueError: é" in found[2]["traceback"] and "traceback" not in found[0]
    assert written.isascii() and "\x1b" not in written


def test_plain_lines_name_worker_and_job(capsys: pytest.CaptureFixture[str]) -> None:
    with own_logs(verbose=True, worker="codec"):
        logging.getLogger("x").info("hello \x1b[31m\r\x00")
        working_on("abcdef")
        logging.getLogger("x").warning("again")
    first, second = capsys.readouterr().err.splitlines()
    assert "INFO [codec] x: hello \\x1b[31m\\r\\x00" in first
    assert "WARNING [codec job abcdef] x: again" in second


def test_printable() -> None:
    assert printable("a\u202eb\x9bc\n日本") == "a\\u202eb\\x9bc\n日本"
    assert printable("a\nb", keep="") == "a\\nb"
