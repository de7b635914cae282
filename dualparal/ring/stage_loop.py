"""Ranks 1 … N-1: walk the schedule that rank 0 announced, one block step after another.

The loop takes an item's activations, posts the receive of the next item, computes, and sends on. It knows no request and no
sampler; the schedule says what to expect.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dualparal.logs import working_on
from dualparal.messages import JobSpec, Span
from dualparal.method.schedule import Item, Schedule, make_schedule
from dualparal.model.lora_source import Lora
from dualparal.model.stage import Conditions, JobShape
from dualparal.ring.texts import TextTrips
from dualparal.ring.transport import GO, TURN, Links, pack, text_in, unpack
from dualparal.ring.worker import working_at


class RunsItems(Protocol):
    """What the runtime asks of a stage; `dualparal.model.stage.Stage` says what each does."""

    layers: range
    is_first: bool
    is_last: bool
    dtype: torch.dtype

    def use_loras(self, loras: Sequence[Lora]) -> None: ...
    def begin(self, shape: JobShape, schedule: Schedule, conditions: list[Conditions]) -> None: ...
    def turn(self, shape: JobShape, schedule: Schedule, conditions: list[Conditions]) -> None: ...
    def end(self) -> None: ...
    def incoming(self, item: Item) -> tuple[tuple[int, ...], torch.dtype]: ...
    def hidden_shape(self, item: Item) -> tuple[int, int, int]: ...
    def prediction_shape(self, item: Item) -> tuple[int, int, int, int, int]: ...
    def hear(self, text: int, said: torch.Tensor) -> None: ...
    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None: ...
    def combine(self, item: Item, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor: ...


def serve_stage(stage: RunsItems, links: Links, report: Callable[[str, list[Span]], None]) -> None:
    """Run announced jobs until rank 0 announces None. `report(job_id, spans)` takes what was worked, about once a second."""
    while True:
        spec: JobSpec | None = links.broadcast(None)
        if spec is None:
            return
        working_on(spec.job_id)
        schedule = make_schedule(spec.rules, spec.plan, spec.experts)
        stage.use_loras(spec.loras)
        (stage.turn if spec.is_turn else stage.begin)(spec.shape, schedule, spec.conditions)
        spans = SpanLog(links.grid.names[links.rank], functools.partial(report, spec.job_id))
        trips = TextTrips(spec.shape, schedule, spec.conditions, links.grid.ring_of(links.rank))
        if run_stage(stage, links, schedule, spans, trips, start=spec.start) != TURN:  # else the next announcement follows
            stage.end()
            working_on(None)


def run_stage(
    stage: RunsItems, links: Links, schedule: Schedule, spans: SpanLog, trips: TextTrips | None = None, *, start: int = 0
) -> float:
    """One job on a rank other than 0, from item `start`; returns GO after the last item, else the signal with which rank 0
    left. `trips` are those of texts that come on the way."""
    incoming, outgoing = links.incoming, links.outgoing
    assert incoming is not None and outgoing is not None
    items = schedule.on_ring(links.grid.ring_of(links.rank), start)

    texts: list[int | None] = []  # that come with each item

    def post(place: int) -> None:
        if place < len(items):
            texts.append(None if trips is None else trips.of(items[place]))
            more = 0 if trips is None else trips.num_elements(texts[place])
            shape, dtype = stage.incoming(items[place])
            incoming.post(math.prod(shape) + more + 1, dtype)

    # The next receive runs beside the work; not on a GPU, where NCCL's waits in a kernel, and CUDA may load a kernel of ours
    # only when the card is idle: rank 0 would wait for our prediction, and we for its message.
    is_early = not incoming.holds_up_the_device
    post(0)
    signal = GO
    for place, item in enumerate(items):
        message = incoming.take()
        hidden, signal = unpack(message, stage.incoming(item)[0])
        if signal != GO:
            if stage.is_first and not stage.is_last:  # what came in was of another size
                more = 0 if trips is None else trips.num_elements(texts[place])
                message = pack(torch.zeros(math.prod(stage.hidden_shape(item)) + more, dtype=stage.dtype), signal)
            if not stage.is_last:
                outgoing.send(message)
            break
        if is_early:
            post(place + 1)
        said = None
        if trips is not None and (text := texts[place]) is not None:
            said = text_in(message, trips.shape)
            stage.hear(text, said)
        with spans.working(item):
            out = stage.run(item, hidden)
        if out is not None:
            outgoing.send(pack(out, text=None if stage.is_last else said))
        incoming.give_back(message)  # `stage.run` keeps nothing of what came in
        if not is_early:
            post(place + 1)
    outgoing.flush()
    spans.flush()
    return signal


class SpanLog:
    """Collects when a stage worked on what, and hands it on about once a second."""

    def __init__(self, stage: str, report: Callable[[list[Span]], None], interval_s: float = 1.0) -> None:
        self._stage, self._report, self._interval_s = stage, report, interval_s
        self._spans: list[Span] = []
        self._reported_s = time.monotonic()

    def working(self, item: Item) -> _Working:
        """Context manager around the work for `item`."""
        return _Working(self, item)

    def add(self, start_s: float, end_s: float, block: int, step: int) -> None:
        self._spans.append(Span(self._stage, start_s, end_s, block, step))
        if end_s - self._reported_s >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        """Hand on what is left."""
        if self._spans:
            self._report(self._spans)
            self._spans = []
        self._reported_s = time.monotonic()


class _Working:
    def __init__(self, spans: SpanLog, item: Item) -> None:
        self._spans, self._item = spans, item

    def __enter__(self) -> None:
        working_at(f"step {self._item.step} of block {self._item.block}")
        self._start_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        working_at(None)
        self._spans.add(self._start_s, time.monotonic(), self._item.block, self._item.step)
