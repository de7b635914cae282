"""NCCL as far as its order matters: what the ranks' programs put on their devices' queues, and whether that ever gets stuck.

The ranks run the project's own loops in threads. Predictions go over gloo, between the hosts. Each device has a stream for
kernels and one for every communicator, or (`one_queue`) a single queue for all, as when kernels that spin leave the others no
room. The head of a queue runs; a send and its receive only together, when both are heads. A host waits where the real one does:
for the kernels of its step, and for a message that it reads. When every host waits and no head can run, that is a deadlock.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dualparal.method.grid import Edge, Grid
from dualparal.ring.transport import RingBeside, edge_device
from tests.fake_cuda.card import CARD

COMPUTE = "compute"


class Deadlock(Exception):
    """Every host waits and no device can go on; says what stands at the head of each queue."""


@dataclass(eq=False)
class Op:
    """Something on a queue. `edge`: of a send or receive, and `number` which of that edge's; `after`: it
    waits for that one."""

    what: str
    edge: Edge | None = None
    number: int = 0
    after: Op | None = None
    payload: torch.Tensor | None = None
    is_on_device: bool = True
    is_done: bool = False


@dataclass
class Cards:
    """The devices of all ranks."""

    grid: Grid
    one_queue: bool
    queues: dict[tuple[int, Any], deque[Op]] = field(default_factory=lambda: defaultdict(deque))
    changed: threading.Condition = field(default_factory=threading.Condition)
    running: int = 0  # hosts that do not wait
    awaited: set[Op] = field(default_factory=set)
    error: Deadlock | None = None

    def put(self, rank: int, stream: Any, op: Op) -> Op:
        with self.changed:
            self.queues[rank, COMPUTE if self.one_queue and op.is_on_device else stream].append(op)
            self._go_on()
        return op

    def wait(self, op: Op) -> None:
        """The host waits for `op`."""
        with self.changed:
            if op.is_done:
                return
            self.awaited.add(op)
            self.running -= 1
            while not op.is_done and self.error is None:
                if self.running == 0:
                    self.error = Deadlock(f"stuck at {self._heads()}")
                    self.changed.notify_all()
                    break
                self.changed.wait()
            if self.error is not None:
                raise self.error

    def leave(self) -> None:
        """A host's program has ended."""
        with self.changed:
            self.running -= 1
            if self.running == 0 and self.awaited and self.error is None:
                self.error = Deadlock(f"stuck at {self._heads()}")
            self.changed.notify_all()

    def _heads(self) -> dict[Any, Any]:
        return {key: (queue[0].what, queue[0].edge, queue[0].number) for key, queue in self.queues.items() if queue}

    def _go_on(self) -> None:
        """Run every head that can be run, and let the hosts go on that waited for one."""
        has_moved = True
        while has_moved:
            has_moved = False
            heads = [(queue, queue[0]) for queue in self.queues.values() if queue]
            receives = {(op.edge, op.number): (queue, op) for queue, op in heads if op.what == "receive"}
            for queue, op in heads:
                if op.what in ("kernel", "wait") and (op.after is None or op.after.is_done):
                    self._done(queue, op)
                    has_moved = True
                elif op.what == "send" and (there := receives.get((op.edge, op.number))) is not None:
                    there[1].payload = op.payload
                    self._done(queue, op)
                    self._done(*there)
                    has_moved = True

    def _done(self, queue: deque[Op], op: Op) -> None:
        queue.popleft()
        op.is_done = True
        if op in self.awaited:  # its host goes on
            self.awaited.remove(op)
            self.running += 1
            self.changed.notify_all()


class NcclEdge:
    """One end of an edge, as `DistributedEdge` uses NCCL."""

    def __init__(self, cards: Cards, rank: int, edge: Edge, most_unsent: int, is_eager: bool) -> None:
        self._is_on_device = edge_device(edge, CARD).type == "cuda"
        self.holds_up_the_device = self._is_on_device and not is_eager
        self._cards, self._rank, self._edge, self._most_unsent = cards, rank, edge, most_unsent
        self._sent: deque[Op] = deque()
        self._posted: deque[tuple[Op, int]] = deque()
        self._number = 0

    def send(self, message: torch.Tensor) -> None:
        while len(self._sent) >= self._most_unsent:
            self._await(self._sent.popleft())
        self._number += 1
        op = Op("send", self._edge, self._number, payload=message.clone(), is_on_device=self._is_on_device)
        self._sent.append(self._cards.put(self._rank, self._edge, op))

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        self._number += 1
        op = Op("receive", self._edge, self._number, is_on_device=self._is_on_device)
        self._posted.append((self._cards.put(self._rank, self._edge, op), num_elements))

    def _await(self, op: Op) -> None:
        """The stream waits for a message over NCCL, the host for one over gloo."""
        if op.is_on_device:
            self._cards.put(self._rank, COMPUTE, Op("wait", after=op))
        else:
            self._cards.wait(op)

    def take(self) -> torch.Tensor:
        """The stream waits for the message, and as its signal is read at once, so does the host."""
        op, num_elements = self._posted.popleft()
        self._await(op)
        self._cards.wait(op)
        assert op.payload is not None and op.payload.numel() == num_elements, "a message met a receive of another size"
        return op.payload

    def give_back(self, message: torch.Tensor) -> None:
        pass

    def flush(self) -> None:
        while self._sent:
            op = self._sent.popleft()
            self._await(op)
            self._cards.wait(op)


class NcclLinks:
    """A rank's place in the ring. `is_eager`: receives are posted before the work, as they must not be."""

    def __init__(self, cards: Cards, rank: int, most_unsent: int, is_eager: bool = False) -> None:
        self.rank, self.grid = rank, cards.grid
        ends = {
            (edge.ring, rank == edge.source): NcclEdge(cards, rank, edge, most_unsent, is_eager)
            for edge in cards.grid.edges()
            if rank in (edge.source, edge.target)
        }
        own = cards.grid.ring_of(rank) or 0
        self.outgoing, self.incoming = ends.get((own, True)), ends.get((own, False))
        self.beside = RingBeside(ends[1, True], ends[1, False]) if (rank, self.grid.guidance) == (0, 2) else None

    def broadcast(self, message: Any) -> Any:
        raise NotImplementedError


def run_hosts(cards: Cards, programs: list[Callable[[], Any]]) -> list[Any]:
    """What each rank's program returns. Raises what the first of them raised."""
    results: list[Any] = [None] * len(programs)
    errors: list[BaseException] = []

    def host(rank: int) -> None:
        try:
            results[rank] = programs[rank]()
        except BaseException as error:
            errors.append(error)
        finally:
            cards.leave()

    cards.running = len(programs)
    threads = [threading.Thread(target=host, args=(rank,), daemon=True) for rank in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results
