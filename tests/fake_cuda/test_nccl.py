"""The programs of all ranks, as NCCL would order them: no schedule gets stuck, on independent streams and on a single queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.method.grid import Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Item, Rules, Schedule, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.stage_loop import SpanLog, run_stage
from dualparal.ring.transport import GO, MAX_UNSENT, STOP
from tests.fake_cuda.nccl import COMPUTE, Cards, Deadlock, NcclLinks, Op, run_hosts

SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


class Kernels:
    """A stage that computes nothing: one kernel an item, which its host waits for."""

    dtype = torch.float32

    def __init__(self, cards: Cards, rank: int, schedule: Schedule) -> None:
        self._cards, self._rank, self._schedule = cards, rank, schedule
        grid, stage = cards.grid, cards.grid.stage_of(rank)
        self.is_first, self.is_last, self._ring = stage == 0, stage == grid.stages - 1, grid.ring_of(rank)

    def incoming(self, item: Item) -> tuple[tuple[int, ...], torch.dtype]:
        if not self.is_first:
            return self.hidden_shape(item), torch.float32
        return (1, 1, sum(self._schedule.window_frames(item)), 1, 1), torch.float32

    def hidden_shape(self, item: Item) -> tuple[int, int, int]:
        return (1 if item.half is not None else 2), sum(self._schedule.window_frames(item)), 1

    def prediction_shape(self, item: Item) -> tuple[int, ...]:
        return 1, 1, self._schedule.plan.lengths[item.block], 1, 1

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        self._cards.wait(self._cards.put(self._rank, COMPUTE, Op("kernel")))
        if not self.is_last:
            return torch.zeros(self.hidden_shape(item))
        return None if item.half == 0 and self._ring is None else torch.zeros(self.prediction_shape(item))

    def combine(self, item: Item, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        return cond + uncond


def denoise(
    schedule: Schedule, grid: Grid, *, one_queue: bool, stop_after: int | None = None, is_eager: bool = False
) -> list[Any]:
    """What every rank's loop returns."""
    cards = Cards(grid, one_queue)
    links = [NcclLinks(cards, rank, MAX_UNSENT, is_eager) for rank in range(grid.ranks)]
    stages = [Kernels(cards, rank, schedule) for rank in range(grid.ranks)]
    samplers = SamplerFactory(SOLVER, num_steps=schedule.num_steps, flow_shift=3.0, device="cpu")
    begun = iter(range(10**9))
    denoiser = Denoiser(
        stages[0], links[0], schedule, samplers,  # type: ignore[arg-type]
        (torch.zeros(1, 1, length, 1, 1) for length in schedule.plan.lengths),
        is_stopped=lambda: stop_after is not None and next(begun) >= stop_after, on_step=lambda item: None,
        on_block=lambda block, latents: None, spans=SpanLog("stage 0", lambda _: None),
    )  # fmt: skip

    def rest(rank: int) -> Callable[[], float]:
        return lambda: run_stage(stages[rank], links[rank], schedule, SpanLog(f"stage {rank}", lambda _: None), None)  # type: ignore[arg-type]

    return run_hosts(cards, [denoiser.run, *(rest(rank) for rank in range(1, grid.ranks))])


RULES = st.builds(
    Rules, max_in_flight=st.integers(1, 6), stagger=st.integers(1, 3), left_context=st.sampled_from(["latest", "own_step"]),
    context=st.sampled_from(["cached", "recomputed"]), micro_batches=st.booleans(), refresh=st.integers(0, 4),
    step_cache=st.sampled_from([None, StepCache(interval=2)]), guided_steps=st.sampled_from([None, (1, 3)]),
)  # fmt: skip
ROWS, TWO_RINGS = st.builds(Grid, st.integers(2, 8)), st.builds(Grid, st.integers(1, 4), st.just(2))
GRIDS = ROWS | TWO_RINGS


@pytest.mark.parametrize("one_queue", [False, True])
@settings(max_examples=40, deadline=None)
@given(rules=RULES, grid=GRIDS, num_blocks=st.integers(1, 6), num_cat=st.integers(0, 2), num_steps=st.integers(1, 7))
def test_no_schedule_gets_stuck(
    one_queue: bool, rules: Rules, grid: Grid, num_blocks: int, num_cat: int, num_steps: int
) -> None:
    rules = replace(rules, micro_batches=rules.micro_batches or grid.guidance > 1)
    schedule = make_schedule(rules, BlockPlan.of(2 * num_blocks, 2, num_cat), (0,) * num_steps)
    assert denoise(schedule, grid, one_queue=one_queue) == [True, *[GO] * (grid.ranks - 1)]


@pytest.mark.parametrize("one_queue", [False, True])
@settings(max_examples=20, deadline=None)
@given(rules=RULES, grid=GRIDS, stop_after=st.integers(0, 20))
def test_nor_does_a_stop(one_queue: bool, rules: Rules, grid: Grid, stop_after: int) -> None:
    rules = replace(rules, micro_batches=rules.micro_batches or grid.guidance > 1)
    schedule = make_schedule(rules, BlockPlan.of(10, 2, 1), (0,) * 5)
    finished, *signals = denoise(schedule, grid, one_queue=one_queue, stop_after=stop_after)
    if grid.guidance == 1 or finished:
        assert set(signals) == {GO if finished else STOP}
    else:  # the second ring may have had all its items, or none at all
        assert set(signals[: grid.stages - 1]) <= {STOP} and len(set(signals[grid.stages - 1 :])) == 1


def test_nothing_of_a_message_is_on_the_first_card_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receives posted ahead spin on a card until their message is there. Rank 0's are not on its card; a stage's is posted when
    its work is done."""
    seen: list[tuple[int, list[str]]] = []
    run = Kernels.run

    def looking(self: Kernels, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        queues = [queue for (rank, _), queue in self._cards.queues.items() if rank == self._rank]
        with self._cards.changed:
            seen.append((self._rank, [op.what for queue in queues for op in queue if op.is_on_device]))
        return run(self, item, incoming)

    monkeypatch.setattr(Kernels, "run", looking)
    schedule = make_schedule(Rules(max_in_flight=3, stagger=2), BlockPlan.of(16, 2, 1), (0,) * 6)
    denoise(schedule, Grid(4), one_queue=False)
    assert len(seen) == 4 * len(schedule.items)
    assert not [ops for _, ops in seen if "receive" in ops]


def test_a_ring_whose_ranks_receive_before_they_work_is_found() -> None:
    """The instrument's own test: with the next receive posted before the work, a device of one queue works on nothing until the
    next message is there, which rank 0 sends when it has the prediction of the present one."""
    schedule = make_schedule(Rules(max_in_flight=1), BlockPlan.of(2, 2, 0), (0,) * 3)
    assert denoise(schedule, Grid(2), one_queue=True) == [True, GO]
    assert denoise(schedule, Grid(2), one_queue=False, is_eager=True) == [True, GO]
    with pytest.raises(Deadlock, match="receive"):
        denoise(schedule, Grid(2), one_queue=True, is_eager=True)
