"""Metrics in Prometheus' text format, made when they are asked for; nothing is sent anywhere.

`metrics_text(engine)` is what `/metrics` answers. Counters start at 0 with the program, as Prometheus expects.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.events import FINAL, Finished
from dualparal.runtime.worker import resident_bytes

if TYPE_CHECKING:
    from dualparal.runtime.engine import Engine
    from dualparal.runtime.job import Job

PREFIX = "dualparal_"
FIRST_FRAMES_BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
ENGINE_STATES = ("starting", "ready", "restarting", "failed", "closed")
JOB_ENDS = tuple(kind.__name__.lower() for kind in FINAL)


class Tally:
    """What has happened since the program began. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_submitted = self.num_interrupted = self.num_frames = 0
        self.ends: Counter[str] = Counter()
        self.first_frames = [0] * (len(FIRST_FRAMES_BUCKETS_S) + 1)  # the last: later than every bucket
        self.first_frames_sum_s = 0.0
        self.denoise_s = 0.0

    def submitted(self) -> None:
        """A job was queued (or queued again)."""
        with self._lock:
            self.num_submitted += 1

    def interrupted(self) -> None:
        """A job was cut off and goes on by itself."""
        with self._lock:
            self.num_interrupted += 1

    def ended(self, job: Job) -> None:
        """A job has ended."""
        final, first_s = job.view().final, job.first_frames_s
        with self._lock:
            self.ends[type(final).__name__.lower()] += 1
            self.num_frames += max(0, getattr(final, "num_frames", 0) - job.num_frames_before)
            if isinstance(final, Finished):
                self.denoise_s += final.timings.get("denoise_s", 0.0)
            if first_s is not None:
                self.first_frames[sum(first_s > limit for limit in FIRST_FRAMES_BUCKETS_S)] += 1
                self.first_frames_sum_s += first_s


def metrics_text(engine: Engine) -> str:
    """Everything that can be told of `engine` now, as `text/plain; version=0.0.4`. Any thread, any state of the engine."""
    tally, jobs = engine.desk.tally, engine.jobs()
    running = [job for job in jobs if job.state == "running"]
    lines: list[str] = []

    def add(name: str, kind: str, help_: str, values: Iterable[tuple[Mapping[str, Any], float]]) -> None:
        lines.append(f"# HELP {PREFIX}{name} {help_}")
        lines.append(f"# TYPE {PREFIX}{name} {kind}")
        lines.extend(_sample(name, labels, value) for labels, value in values)

    add("engine_state", "gauge", "1 for the state the engine is in.",
        [({"state": state}, float(engine.state == state)) for state in ENGINE_STATES])  # fmt: skip
    add("replicas_ready", "gauge", "Worker groups that can take a job.",
        [({}, sum(replica.state == "ready" for replica in engine.replicas))])  # fmt: skip
    add("worker_restarts_total", "counter", "Worker groups started anew after a death.",
        [({"replica": number}, replica.num_restarts) for number, replica in enumerate(engine.replicas)])  # fmt: skip
    add("jobs", "gauge", "Jobs that have not ended, comparisons included.",
        [({"state": "queued"}, len(jobs) - len(running)), ({"state": "running"}, len(running))])  # fmt: skip
    add("queue_length", "gauge", "Jobs waiting for a worker group.", [({}, len(engine.desk.queue))])
    add("jobs_submitted_total", "counter", "Jobs queued, resumed ones included.", [({}, tally.num_submitted)])
    add("jobs_ended_total", "counter", "Jobs by how they ended.",
        [({"state": state}, tally.ends[state]) for state in JOB_ENDS])  # fmt: skip
    add("jobs_interrupted_total", "counter", "Jobs cut off by a worker's death that went on by themselves.",
        [({}, tally.num_interrupted)])  # fmt: skip
    add("frames_total", "counter", "Video frames of ended jobs; rate() gives frames per second.", [({}, tally.num_frames)])
    add("denoise_seconds_total", "counter", "Seconds of denoising of finished jobs.", [({}, tally.denoise_s)])
    lines += _histogram("first_frames_seconds", "Seconds from submit to the first playable frames.", tally)
    add("stage_busy_ratio", "gauge", "Share of the last seconds in which a stage computed.", _busy(engine))
    add("worker_resident_bytes", "gauge", "Host memory of a worker.", _resident(engine))
    add("worker_device_bytes", "gauge", "GPU memory that a worker's torch has reserved.",
        [({"replica": number, "worker": name}, beat.device_bytes) for number, replica in enumerate(engine.replicas)
         for name, beat in dict(replica.beats).items() if beat.device_bytes is not None])  # fmt: skip
    add("disk_free_bytes", "gauge", "Free space where videos are kept.", _free(engine.outputs))
    return "\n".join(lines) + "\n"


def _histogram(name: str, help_: str, tally: Tally) -> list[str]:
    lines = [f"# HELP {PREFIX}{name} {help_}", f"# TYPE {PREFIX}{name} histogram"]
    total = 0
    for limit, count in zip((*FIRST_FRAMES_BUCKETS_S, "+Inf"), tally.first_frames, strict=True):
        total += count
        lines.append(_sample(f"{name}_bucket", {"le": limit}, total))
    return [*lines, _sample(f"{name}_sum", {}, tally.first_frames_sum_s), _sample(f"{name}_count", {}, total)]


def _busy(engine: Engine) -> list[tuple[dict[str, Any], float]]:
    found: list[tuple[dict[str, Any], float]] = []
    for number, replica in enumerate(engine.replicas):
        job = replica.at_rank_0
        shares = job.busy(engine.ranks) if job is not None else (0.0,) * engine.ranks
        found += [({"replica": number, "stage": stage}, share) for stage, share in enumerate(shares)]
    return found


def _resident(engine: Engine) -> list[tuple[dict[str, Any], float]]:
    """As each worker says of itself: it may run on another host."""
    own = resident_bytes()
    found: list[tuple[dict[str, Any], float]] = [] if own is None else [({"replica": "", "worker": "front end"}, own)]
    for number, replica in enumerate(engine.replicas):
        for name, beat in dict(replica.beats).items():
            if beat.resident_bytes is not None:
                found.append(({"replica": number, "worker": name}, beat.resident_bytes))
    return found


def _free(outputs: Path) -> list[tuple[dict[str, Any], float]]:
    try:
        return [({}, shutil.disk_usage(outputs).free)]
    except OSError:  # not made yet
        return []


def _sample(name: str, labels: Mapping[str, Any], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(str(content))}"' for key, content in labels.items())
    number = "NaN" if value != value else f"{value:.17g}"
    return f"{PREFIX}{name}{'{' + inner + '}' if inner else ''} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
