"""Buffers of messages are used again, and never while somebody still needs them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualparal.planning import memory as estimate
from dualparal.ring import transport
from dualparal.ring.transport import GO, MAX_SPARE, MAX_UNSENT, Buffers, DistributedEdge, pack, unpack

CPU = torch.device("cpu")
SIZES = (5, 5, 5, 7, 5, 7, 7, 3)  # a job's messages have a few sizes, in any order


class LateWire:
    """torch.distributed's two calls at their worst: a sent buffer is read only when its handle is waited for, a posted one is
    spoilt at once and filled only when its handle is waited for."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []  # what went out
        self.buffers: set[int] = set()  # where the buffers lay
        self.values = iter(range(10**6))  # what comes in: message i is full of i

    def isend(self, message: torch.Tensor, peer: int, group: Any) -> Any:
        self.buffers.add(message.data_ptr())
        return self._handle(lambda: self.read.append(message.clone()))

    def irecv(self, buffer: torch.Tensor, peer: int, group: Any) -> Any:
        self.buffers.add(buffer.data_ptr())
        buffer.fill_(float("nan"))
        return self._handle(lambda: self._arrive(buffer))

    def _arrive(self, buffer: torch.Tensor) -> None:
        buffer.fill_(float(next(self.values)))
        buffer[-1] = 0.0

    def _handle(self, act: Callable[[], None]) -> Any:
        return SimpleNamespace(wait=lambda timeout: act())


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> LateWire:
    found = LateWire()
    monkeypatch.setattr(transport, "dist", found)
    monkeypatch.setattr(transport, "_buffers", Buffers())
    return found


def test_a_gpus_receive_waits_on_the_device() -> None:
    """`stage_worker` must know: it posts such a receive after its work."""
    assert DistributedEdge(1, None, torch.device("cuda"), 60).holds_up_the_device
    assert not edge().holds_up_the_device


def edge() -> DistributedEdge:
    return DistributedEdge(1, None, CPU, 60)


def test_a_sent_buffer_is_written_again_only_after_its_handle(wire: LateWire) -> None:
    out, kept = edge(), []
    for value, size in enumerate(SIZES * 20):
        message = pack(torch.full((1, size), float(value)))
        kept.append(message.data_ptr())
        out.send(message)
    out.flush()
    assert len(wire.read) == len(SIZES) * 20
    for value, (message, size) in enumerate(zip(wire.read, SIZES * 20, strict=True)):
        assert message.tolist() == [float(value)] * size + [0.0]


def test_senders_of_one_size_need_few_buffers(wire: LateWire) -> None:
    out = edge()
    for value in range(50):
        out.send(pack(torch.full((4, 2), float(value))))
    assert len(wire.buffers) == MAX_UNSENT + 1


def test_a_message_is_whole_until_it_is_given_back(wire: LateWire) -> None:
    """As a stage does it: the next receive is posted before the message is worked on."""
    into, sizes = edge(), SIZES * 20
    into.post(sizes[0] + 1, torch.float32)
    for value, size in enumerate(sizes):
        message = into.take()
        hidden, signal = unpack(message, (1, size))
        assert signal == GO
        if value + 1 < len(sizes):
            into.post(sizes[value + 1] + 1, torch.float32)
        assert hidden.tolist() == [[float(value)] * size]
        into.give_back(message)


def test_receivers_of_one_size_need_two_buffers(wire: LateWire) -> None:
    into = edge()
    into.post(9, torch.float32)
    for _ in range(50):
        message = into.take()
        into.post(9, torch.float32)
        into.give_back(message)
    assert len(wire.buffers) == 2


def test_the_memory_plan_counts_these_buffers(wire: LateWire) -> None:
    """Of hidden states: in a stage between two others, in the last one, and on rank 0."""
    into, out = edge(), edge()
    into.post(9, torch.float32)
    for _ in range(50):
        message = into.take()
        into.post(9, torch.float32)
        out.send(pack(unpack(message, (8,))[0]))
        into.give_back(message)
    middle, only_sends, only_receives = len(wire.buffers), MAX_UNSENT + 1, 2
    assert middle <= estimate._messages(1, 3) == 5
    assert only_sends <= estimate._messages(0, 2) == 3
    assert only_receives <= estimate._messages(2, 3) == 3
    assert estimate._messages(0, 1) == 1, "nothing is sent"


def test_what_is_not_given_back_stays(wire: LateWire) -> None:
    """Rank 0's samplers hold on to predictions, while its own activations go out and come back as buffers."""
    into, out, kept = edge(), edge(), []
    for value in range(20):
        into.post(9, torch.float32)
        out.send(pack(torch.full((8,), -float(value))))
        kept.append(into.take())
    out.flush()
    assert [message[0].item() for message in kept] == [float(value) for value in range(20)]
    assert len({message.data_ptr() for message in kept}) == 20


def test_a_stop_that_is_handed_on_belongs_to_the_next_edge(wire: LateWire) -> None:
    into, out = edge(), edge()
    into.post(9, torch.float32)
    message = into.take()
    out.send(message)
    out.flush()
    del message
    into.post(9, torch.float32)  # the next job begins
    sending = pack(torch.full((8,), 5.0))
    arrived = into.take()
    assert sending.tolist() == [5.0] * 8 + [0.0] and arrived[0] == 1.0
    assert sending.data_ptr() != arrived.data_ptr()


def test_buffers_are_few_and_like_what_was_asked_for() -> None:
    spare = Buffers()
    given = [torch.zeros(size, dtype=dtype) for size in (3, 4) for dtype in (torch.float32, torch.bfloat16)]
    for buffer in given:
        spare.give_back(buffer)
    assert len(spare._spare) == MAX_SPARE
    assert spare.take(3, torch.float32, CPU) is not given[0], "the oldest had to go"
    assert spare.take(4, torch.bfloat16, CPU) is given[3]
    assert spare.take(4, torch.bfloat16, CPU) is not given[3]
    assert spare.take(5, torch.float32, CPU).shape == (5,)
    assert spare.take(4, torch.float32, torch.device("meta")).device.type == "meta"
