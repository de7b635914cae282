"""The event model against the runtime's own loops in virtual time: their clocks move by work and by waiting only.

Every rank has a clock of its own. Work adds to it, a message carries its sender's, and whoever waits takes the later of the
two; what is left is the order in which `Denoiser` and `run_stage` work, with the edges' limits on messages under way.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Any

import pytest
import torch

from dualparal.method.event_model import ItemCost, even_cost, forecast
from dualparal.method.grid import Edge, Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Item, Rules, Schedule, make_schedule
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.stage_loop import SpanLog, run_stage
from dualparal.ring.transport import MAX_UNSENT, RingBeside
from tests.settings import settings

DEADLINE_S = 120


class Clock:
    now = 0.0

    def wait_until(self, time: float) -> None:
        self.now = max(self.now, time)


class Wire:
    """From one rank to the next: messages with the time they were sent, and the times their receives were posted."""

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[torch.Tensor, float]] = queue.Queue()
        self.posts: queue.Queue[float] = queue.Queue()


class VirtualEdge:
    """An end of a wire. A message is on its way once it is sent and its receive is posted, as over gloo."""

    holds_up_the_device = False

    def __init__(self, wire: Wire, clock: Clock) -> None:
        self._wire, self._clock = wire, clock
        self._unsent: deque[float] = deque()
        self._posted: deque[float] = deque()

    def send(self, message: torch.Tensor) -> None:
        while len(self._unsent) >= MAX_UNSENT:
            self._await_oldest()
        self._unsent.append(self._clock.now)
        self._wire.messages.put((message, self._clock.now))

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        self._posted.append(self._clock.now)
        self._wire.posts.put(self._clock.now)

    def take(self) -> torch.Tensor:
        message, sent = self._wire.messages.get(timeout=DEADLINE_S)
        self._clock.wait_until(max(sent, self._posted.popleft()))
        return message

    def give_back(self, message: torch.Tensor) -> None:
        pass

    def flush(self) -> None:
        while self._unsent:
            self._await_oldest()

    def _await_oldest(self) -> None:
        self._clock.wait_until(max(self._unsent.popleft(), self._wire.posts.get(timeout=DEADLINE_S)))


class VirtualLinks:
    def __init__(self, rank: int, grid: Grid, wires: dict[Edge, Wire], clock: Clock) -> None:
        self.rank, self.grid = rank, grid
        ends = {
            (edge.ring, rank == edge.source): VirtualEdge(wire, clock)
            for edge, wire in wires.items()
            if rank in (edge.source, edge.target)
        }
        own = grid.ring_of(rank) or 0
        self.outgoing, self.incoming = ends.get((own, True)), ends.get((own, False))
        self.beside = RingBeside(ends[1, True], ends[1, False]) if (rank, self.grid.guidance) == (0, 2) else None

    def broadcast(self, message: Any) -> Any:
        raise NotImplementedError


class VirtualStage:
    """Works by moving its clock; notes when it was done with each block's last step."""

    dtype = torch.float32

    def __init__(self, rank: int, grid: Grid, schedule: Schedule, cost: ItemCost, clock: Clock) -> None:
        self.rank, self.ring, self._schedule, self._cost, self._clock = rank, grid.ring_of(rank), schedule, cost, clock
        self.is_first, self.is_last = grid.stage_of(rank) == 0, grid.stage_of(rank) == grid.stages - 1
        self.layers = range(rank, rank + 1)
        self.done: dict[int, float] = {}
        self.worked = 0.0

    def incoming(self, item: Item) -> tuple[tuple[int, ...], torch.dtype]:
        """A window's latents, or activations."""
        return (1, 1, sum(self._schedule.window_frames(item)) if self.is_first else 1, 1, 1), torch.float32

    def hidden_shape(self, item: Item) -> tuple[int, int, int]:
        return 1, 1, 1

    def prediction_shape(self, item: Item) -> tuple[int, int, int, int, int]:
        return 1, 1, self._schedule.plan.lengths[item.block], 1, 1

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        spent = self._cost(item, self.rank)
        self._clock.now += spent
        self.worked += spent
        if item.step + 1 == self._schedule.num_steps and (item.is_whole or self.ring is not None):
            self.done[item.block] = self._clock.now
        if self.is_last:
            return torch.zeros(self.prediction_shape(item)) if item.is_whole or self.ring is not None else None
        return torch.zeros(self.hidden_shape(item))

    def combine(self, item: Item, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        return cond + uncond


class NoSampler:
    timesteps = torch.zeros(1)

    def new(self, max_order: int | None = None) -> NoSampler:
        return self

    def record(self, prediction: torch.Tensor, mode: Any) -> None:
        pass

    def step(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return latents


def run_in_virtual_time(schedule: Schedule, grid: Grid, cost: ItemCost) -> tuple[dict[int, float], list[float]]:
    """(when the last stages were done with each block, share of the whole that each rank worked)."""
    ranks = grid.ranks
    clocks, wires = [Clock() for _ in range(ranks)], {edge: Wire() for edge in grid.edges()}
    links = [VirtualLinks(rank, grid, wires, clocks[rank]) for rank in range(ranks)]
    stages = [VirtualStage(rank, grid, schedule, cost, clocks[rank]) for rank in range(ranks)]
    spans = [SpanLog(grid.names[rank], lambda _: None) for rank in range(ranks)]
    threads = [
        threading.Thread(target=run_stage, args=(stages[rank], links[rank], schedule, spans[rank]), daemon=True)
        for rank in range(1, ranks)
    ]
    for thread in threads:
        thread.start()
    noise = iter([torch.zeros(1, 1, length, 1, 1) for length in schedule.plan.lengths])
    sampler: Any = NoSampler()
    denoiser = Denoiser(
        stages[0], links[0], schedule, sampler, noise, is_stopped=lambda: False, on_step=lambda item: None,
        on_block=lambda block, latents: None, spans=spans[0],
    )  # fmt: skip
    assert denoiser.run()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    ends = [stage.done for stage in stages if stage.is_last]
    done = {block: max(end.get(block, 0.0) for end in ends) for block in ends[0]}
    return done, [stage.worked / max(done.values()) for stage in stages]


METHODS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, micro-batches": {"micro_batches": True},
    "paper, cached": {"context": "cached"},
    "preview": {"schedule": "preview"},
    "preview, cached": {"schedule": "preview", "context": "cached"},
    "no context": {"num_cat": 0},
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("method", METHODS)
def test_model_and_runtime_agree(method: str, ranks: int) -> None:
    values = {"num_cat": 4, "latents_num": 4 * 9 + 4, "num_inference_steps": 8, **METHODS[method]}
    request = settings(ranks=ranks, num_per_block=4, height=32, width=32, guidance_scale=5.0, **values)
    schedule = make_schedule(rules_of(request), plan_of(request), (0,) * 8)
    cost = even_cost(schedule, ranks)
    model = forecast(schedule, ranks, cost)
    done, busy = run_in_virtual_time(schedule, Grid(ranks), cost)
    assert [done[block] for block in sorted(done)] == pytest.approx(model.block_done)
    assert max(done.values()) == pytest.approx(model.total)
    assert busy == pytest.approx(model.busy)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_they_agree_on_two_rings(method: str, stages: int) -> None:
    """To the last digit: both halves of a block step leave at once, and rank 0 has its prediction when both are back."""
    values = {"num_cat": 4, "latents_num": 4 * 9 + 4, "num_inference_steps": 8, **METHODS[method]}
    request = settings(ranks=stages, rings=2, num_per_block=4, height=32, width=32, guidance_scale=5.0, **values)
    request = request.model_copy(update={"guidance_start": 0.2})  # the second ring has nothing to do in the first steps
    schedule = make_schedule(rules_of(request), plan_of(request), (0,) * 8)
    assert any(item.half == 1 for item in schedule.items) and not all(item.half is not None for item in schedule.items)
    cost = even_cost(schedule, stages)
    model = forecast(schedule, stages, cost, rings=2)
    done, busy = run_in_virtual_time(schedule, Grid(stages, 2), cost)
    assert [done[block] for block in sorted(done)] == pytest.approx(model.block_done)
    assert busy == pytest.approx(model.busy)


@pytest.mark.parametrize("ranks", [2, 4])
def test_they_agree_with_an_uneven_split(ranks: int) -> None:
    schedule = make_schedule(Rules(left_context="own_step", max_in_flight=3, stagger=4), BlockPlan.of(30, 3, 3), (0,) * 12)
    even = even_cost(schedule, ranks)

    def cost(item: Item, rank: int) -> float:
        return even(item, rank) * (1.5 if rank == ranks - 1 else 1.0)

    model = forecast(schedule, ranks, cost)
    done, _ = run_in_virtual_time(schedule, Grid(ranks), cost)
    assert done[0] == pytest.approx(model.first_block, rel=0.01)
    assert max(done.values()) == pytest.approx(model.total, rel=0.01)


def test_at_most_two_items_a_rank_are_under_way() -> None:
    """The last rank is slow at first and rank 0 later: without the limit rank 0 would use the time to run ahead. By hand:
    item n leaves no earlier than item n - 4 is back."""
    schedule = make_schedule(Rules(), BlockPlan((4,) * 12, 0), (0,))  # no context: blocks do not wait for each other
    assert len(schedule.items) == 12

    def cost(item: Item, rank: int) -> float:
        return 100.0 if (rank == 1) == (item.index < 4) else 1.0

    first_free = last_free = 0.0
    back: list[float] = []
    for number, item in enumerate(schedule.items):
        first_free = max(first_free, back[number - 4] if number >= 4 else 0.0) + cost(item, 0)
        last_free = max(last_free, first_free) + cost(item, 1)
        back.append(last_free)
    assert forecast(schedule, 2, cost).total == back[-1] == 902.0
