"""No wait is missing where work runs on other streams than its own, or comes and goes through pinned memory; none is too many
either: whichever is taken out of the project's code, the instrument finds what it was there for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualparal.method.grid import Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Item, Rules, make_schedule
from dualparal.model.feature_cache import KeyValue
from dualparal.model.host_cache import CacheMover, HostCache
from dualparal.model.stage import JobShape
from dualparal.model.vae import to_uint8
from dualparal.planning.sizes import WAN_1_3B
from dualparal.ring import transport
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.stage_loop import SpanLog, run_stage
from dualparal.ring.transport import DistributedEdge, edge_device
from tests.fake_cuda.card import CARD, fake_card
from tests.fake_cuda.streams import Event, Order, in_order, join
from tests.fake_cuda.test_stages import CONTEXTS, LATENTS, SPLITS, run, stages_of

LAYERS = 5
SCHEDULE = make_schedule(Rules(max_in_flight=2, stagger=2, micro_batches=True), BlockPlan.of(9, 3, 1), (0,) * 4)


def on_card(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=CARD)


def caches_in_host_memory(order: Order) -> None:
    """Blocks leave K and V layer by layer, which their neighbours use twice, the second time for good."""
    mover = CacheMover(CARD)
    kept: HostCache | None = None
    for _ in range(3):
        cache = HostCache(mover)
        for uses in ("again", "for good"):
            for layer in range(LAYERS):
                pair: KeyValue = (on_card(2, 300, 8), on_card(2, 300, 8))
                if uses == "for good":
                    cache[layer] = (pair[0].clone(), pair[1].clone())
                if kept is not None:
                    k, v = kept[layer] if uses == "again" else kept.pop(layer)
                    pair = (pair[0] + k, pair[1] + v)
                    del k, v
        kept = cache
    mover.flush()


class Plain:
    """A stage that computes next to nothing."""

    layers, dtype = range(1), torch.float32

    def __init__(self, is_last: bool) -> None:
        self.is_last = is_last

    def hidden_shape(self, item: Item) -> tuple[int, int, int]:
        return 1, sum(SCHEDULE.window_frames(item)), 4

    def prediction_shape(self, item: Item) -> tuple[int, int, int, int, int]:
        return 1, 2, SCHEDULE.plan.lengths[item.block], 2, 2

    def incoming(self, item: Item) -> tuple[tuple[int, ...], torch.dtype]:
        return self.hidden_shape(item), self.dtype

    def run(self, item: Item, incoming: torch.Tensor) -> torch.Tensor | None:
        assert incoming.device == CARD
        seen = incoming.sum()
        if not self.is_last:
            return seen + on_card(*self.hidden_shape(item))
        return seen + on_card(*self.prediction_shape(item)) if item.is_whole else None


class Group:
    """Of an edge: NCCL works on a stream of its own, which waits for the present one first; gloo in a thread of the host."""

    def __init__(self, order: Order, device: torch.device) -> None:
        self._is_nccl = device.type == "cuda"
        self._order, self._stream = order, order.new_stream("nccl" if self._is_nccl else "gloo")

    def carry(self, message: torch.Tensor, *, writes: bool) -> Event:
        if self._is_nccl:
            join(self._stream.clock, self._order.current.clock)
        self._stream.tick()
        self._order.touch(self._stream, message, writes=writes)
        return Event(self._order, dict(self._stream.clock), blocks=not self._is_nccl)


def links_of(order: Order, rank: int, ranks: int, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(transport, "_buffers", transport.Buffers())
    patch.setattr(transport.dist, "isend", lambda message, _, group: group.carry(message, writes=False))
    patch.setattr(transport.dist, "irecv", lambda message, _, group: group.carry(message, writes=True))
    edges = list(Grid(ranks).edges())
    there, here = edge_device(edges[rank], CARD), edge_device(edges[rank - 1], CARD)
    return SimpleNamespace(
        rank=rank, grid=Grid(ranks), beside=None, outgoing=DistributedEdge((rank + 1) % ranks, Group(order, there), there, 60),
        incoming=DistributedEdge((rank - 1) % ranks, Group(order, here), here, 60),
    )  # fmt: skip


def rank_0(order: Order, patch: pytest.MonkeyPatch) -> None:
    samplers = SamplerFactory(
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, num_steps=4, flow_shift=3.0, device="cpu"
    )
    samplers.timesteps = samplers._template.timesteps = samplers.timesteps.to(CARD)
    frames: list[torch.Tensor] = []
    assert Denoiser(
        Plain(False), links_of(order, 0, 3, patch), SCHEDULE, samplers,  # type: ignore[arg-type]
        (torch.ones(1, 2, length, 2, 2) for length in SCHEDULE.plan.lengths), is_stopped=lambda: False,
        on_step=lambda item: None, on_block=lambda block, latents: frames.append(to_uint8(latents) + 1),
        spans=SpanLog("stage 0", lambda _: None),
    ).run()  # fmt: skip
    assert len(frames) == SCHEDULE.plan.num_blocks


def rank_1(order: Order, patch: pytest.MonkeyPatch) -> None:
    run_stage(Plain(False), links_of(order, 1, 3, patch), SCHEDULE, SpanLog("stage 1", lambda _: None))  # type: ignore[arg-type]


def rank_2(order: Order, patch: pytest.MonkeyPatch) -> None:
    run_stage(Plain(True), links_of(order, 2, 3, patch), SCHEDULE, SpanLog("stage 2", lambda _: None))  # type: ignore[arg-type]


PROGRAMS: dict[str, Callable[..., None]] = {
    "caches in host memory": lambda order, patch: caches_in_host_memory(order),
    "rank 0": rank_0, "a rank between": rank_1, "the last rank": rank_2,
}  # fmt: skip
NUMBER = "_apply _check _local_scalar_dense"  # rank 0 looks for NaN, which is no matter of order
NOISE = "_walk _enter _to_copy"  # comes from memory that nobody writes again
PREDICTIONS = "take _taken _to_copy"  # are looked at for NaN at once


def order_of(program: str, *without: str) -> Order:
    with pytest.MonkeyPatch.context() as patch, fake_card(patch), in_order(patch) as order:
        patch.setattr("dualparal.ring.stage_loop.unpack", lambda message, shape: (message[:-1].view(shape), transport.GO))
        order.without = frozenset(without)
        PROGRAMS[program](order, patch)
    return order


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_wait_is_there_and_each_is_needed(program: str) -> None:
    whole = order_of(program)
    assert not whole.races
    needed = whole.waits - {NUMBER, NOISE, PREDICTIONS}
    assert len(needed) > 1
    found = {wait: order_of(program, wait).races for wait in sorted(needed)}
    assert all(found.values()), [wait for wait, races in found.items() if not races]


def order_of_stage(options: dict[str, Any], *without: str) -> Order:
    schedule = make_schedule(CONTEXTS["preview cached"], BlockPlan.of(20, 8, 8), (0,) * 4)
    with pytest.MonkeyPatch.context() as patch, fake_card(patch) as notes, in_order(patch) as order:
        order.without = frozenset(without)
        stages = stages_of(WAN_1_3B, 1, SPLITS["only"], **options)
        shape = JobShape(*LATENTS, 2, (5.0, 5.0), (0,) * schedule.plan.num_blocks)
        run(stages, schedule, shape, torch.bfloat16, notes)
    return order


@pytest.mark.parametrize(
    ("option", "wait"),
    [("is_cache_offloaded", "__getitem__ wait_for wait_event"), ("is_offloaded", "run forward synchronize")],
)
def test_a_stage_whose_caches_or_layers_wait_in_host_memory(option: str, wait: str) -> None:
    """The second wait is diffusers': for a layer to come, and for the card to be through with one that goes."""
    whole = order_of_stage({option: True})
    assert not whole.races and wait in whole.waits
    assert order_of_stage({option: True}, wait).races


def test_a_prediction_is_on_the_card_before_its_memory_is_written_again() -> None:
    """Two waits see to it: the copy's, and that for the number it is looked at for."""
    assert {NUMBER, PREDICTIONS} <= order_of("rank 0").waits
    assert order_of("rank 0", NUMBER, PREDICTIONS).races


@pytest.mark.parametrize("is_recorded", [False, True])
def test_memory_that_another_stream_is_still_at(is_recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator gives it to the next tensor of its own stream, unless it is told who else uses it."""
    with fake_card(monkeypatch), in_order(monkeypatch) as order:
        x, other = on_card(8), torch.cuda.Stream(CARD)
        other.wait_stream(torch.cuda.current_stream(CARD))
        with torch.cuda.stream(other):
            x.sum()
        if is_recorded:
            x.record_stream(other)
        del x
    assert bool(order.races) != is_recorded
