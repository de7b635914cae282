"""Metrics in Prometheus' text format, collected when they are asked for; nothing is sent anywhere.

`metrics_text(engine)` is what `/metrics` answers, from a registry of that engine's own. Counters start at 0 with the program,
as Prometheus expects.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dualparal.engine.tally import FIRST_FRAMES_BUCKETS_S, Tally
from dualparal.events import FINAL
from dualparal.ring.worker import resident_bytes

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

PREFIX = "dualparal_"
ENGINE_STATES = ("starting", "ready", "restarting", "failed", "closed")
JOB_ENDS = tuple(kind.__name__.lower() for kind in FINAL)
Samples = Iterable[tuple[Mapping[str, Any], float]]


def metrics_text(engine: Engine) -> str:
    """Everything that can be told of `engine` now, as `text/plain; version=0.0.4`. Any thread, any state of the engine."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine))
    return generate_latest(registry).decode()


class EngineCollector(Collector):
    """Reads an engine whenever its registry is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterator[Metric]:
        """Every metric once."""
        engine, tally, jobs = self._engine, self._engine.dispatcher.tally, self._engine.jobs()
        num_running = sum(job.state == "running" for job in jobs)
        yield _gauge("engine_state", "1 for the state the engine is in.",
                     [({"state": state}, float(engine.state == state)) for state in ENGINE_STATES])  # fmt: skip
        yield _gauge("replicas_ready", "Worker groups that can take a job.",
                     [({}, sum(replica.state == "ready" for replica in engine.replicas))])  # fmt: skip
        restarts: Samples = [({"replica": number}, replica.num_restarts) for number, replica in enumerate(engine.replicas)]
        yield _counter("worker_restarts", "Worker groups started anew after a death.", restarts)
        yield _gauge("jobs", "Jobs that have not ended, comparisons included.",
                     [({"state": "queued"}, len(jobs) - num_running), ({"state": "running"}, num_running)])  # fmt: skip
        yield _gauge("queue_length", "Jobs waiting for a worker group.", [({}, len(engine.dispatcher.queue))])
        yield _counter("jobs_submitted", "Jobs queued, resumed ones included.", [({}, tally.num_submitted)])
        yield _counter("jobs_ended", "Jobs by how they ended.", [({"state": state}, tally.ends[state]) for state in JOB_ENDS])
        yield _counter("jobs_interrupted", "Jobs cut off by a worker's death that went on by themselves.",
                       [({}, tally.num_interrupted)])  # fmt: skip
        yield _counter("frames", "Video frames of ended jobs; rate() gives frames per second.", [({}, tally.num_frames)])
        yield _counter("denoise_seconds", "Seconds of denoising of finished jobs.", [({}, tally.denoise_s)])
        yield _first_frames(tally)
        yield _gauge("stage_busy_ratio", "Share of the last seconds in which a stage computed.", _busy(engine))
        yield _gauge("worker_resident_bytes", "Host memory of a worker.", _resident(engine))
        on_device = [(labels, beat.device_bytes) for labels, beat in _beats(engine) if beat.device_bytes is not None]
        yield _gauge("worker_device_bytes", "GPU memory that a worker's torch has reserved.", on_device)
        yield _gauge("disk_free_bytes", "Free space where videos are kept.", _free(engine))


def _gauge(name: str, about: str, samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, about), PREFIX + name, samples)


def _counter(name: str, about: str, samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, about), f"{PREFIX}{name}_total", samples)


def _filled(metric: Metric, name: str, samples: Samples) -> Metric:
    for labels, value in samples:
        metric.add_sample(name, {key: str(content) for key, content in labels.items()}, value)
    return metric


def _first_frames(tally: Tally) -> Metric:
    limits = (*map(str, FIRST_FRAMES_BUCKETS_S), "+Inf")
    counts = list(zip(limits, accumulate(tally.first_frames), strict=True))
    about = "Seconds from submit to the first playable frames."
    return HistogramMetricFamily(PREFIX + "first_frames_seconds", about, buckets=counts, sum_value=tally.first_frames_sum_s)


def _busy(engine: Engine) -> Iterator[tuple[dict[str, Any], float]]:
    for number, replica in enumerate(engine.replicas):
        job = replica.at_rank_0
        names = engine.grid.names
        shares = job.timeline.busy(names) if job is not None else (0.0,) * len(names)
        for name, share in zip(names, shares, strict=True):
            yield {"replica": number, "stage": name.removeprefix("stage ")}, share


def _beats(engine: Engine) -> list[tuple[dict[str, Any], Any]]:
    return [
        ({"replica": number, "worker": name}, beat)
        for number, replica in enumerate(engine.replicas)
        for name, beat in dict(replica.beats).items()
    ]


def _resident(engine: Engine) -> list[tuple[dict[str, Any], float]]:
    """As each worker says of itself: it may run on another host."""
    workers = [(labels, beat.resident_bytes) for labels, beat in _beats(engine)]
    found = [({"replica": "", "worker": "front end"}, resident_bytes()), *workers]
    return [(labels, num_bytes) for labels, num_bytes in found if num_bytes is not None]


def _free(engine: Engine) -> list[tuple[dict[str, Any], float]]:
    try:
        return [({}, shutil.disk_usage(engine.outputs).free)]
    except OSError:  # not made yet
        return []
