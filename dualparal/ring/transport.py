"""How ranks talk: a ring of directed edges for activations, and a control group for job announcements.

Rank r sends to r + 1, the last rank sends predictions back to rank 0; of two rings (`method.grid`) each is such a row, and rank
0 sends latents to the beginning of the second. A rank posts the receive of its next item before it
computes the present one (with NCCL after it, see `stage_worker`); sends are asynchronous and their handles and tensors are kept
until done (gloo loses the message otherwise). Only then are they written again: a job's messages have few sizes, so that its
loop allocates none. Each message ends with one element, its signal, so that Stop travels with the block step it ends.

Nothing here is polled and nothing depends on who comes first: order is the schedule's.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dualparal.errors import WorkerDied
from dualparal.method.grid import Edge as GridEdge
from dualparal.method.grid import Grid
from dualparal.ring.announcement import decode, encode
from dualparal.ring.authentication import authenticate

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_UNSENT = 2  # messages a sender holds: one that the peer is taking, one for it to go on with
GO, STOP, TURN = 0.0, 1.0, 2.0  # signals; each is exact in every dtype
MAX_SPARE = 3  # buffers kept for reuse: what a stage has beside those on their way
IDLE_TIMEOUT = datetime.timedelta(days=3650)  # an idle server must never trip a watchdog


class Edge(Protocol):
    """One directed connection of the ring, seen from one end. `holds_up_the_device`: a posted receive waits on the device, so
    that work given to it later may not begin before the message has come."""

    holds_up_the_device: bool

    def send(self, message: torch.Tensor) -> None:
        """Start sending `message` (flat). It is the edge's from now on: the caller must neither change nor keep it."""

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        """Start receiving the next message, which will have `num_elements`."""

    def take(self) -> torch.Tensor:
        """Wait for the oldest posted message; raises `WorkerDied` when the peer is gone or the deadline has passed."""

    def give_back(self, message: torch.Tensor) -> None:
        """Let a taken message be overwritten: nothing may look at it, or at a view of it, from now on."""

    def flush(self) -> None:
        """Wait until everything sent has been taken."""


@dataclass(frozen=True)
class RingBeside:
    """Rank 0's connections to the first and from the last rank of the ring that is not its own."""

    outgoing: Edge
    incoming: Edge


class Links(Protocol):
    """A rank's place in the grid. `incoming` and `outgoing` are those along its ring, None where that is rank 0 alone; `beside`
    is the other ring, for rank 0 only."""

    rank: int
    grid: Grid
    incoming: Edge | None
    outgoing: Edge | None
    beside: RingBeside | None

    def broadcast(self, message: T | None) -> T | None:
        """Rank 0's `message`, on every rank (elsewhere with its tensors on the CPU); waits without a deadline while the engine
        is idle."""


class Buffers:
    """Flat buffers that are free to be written again: the last few, of whatever size and dtype."""

    def __init__(self) -> None:
        self._spare: deque[torch.Tensor] = deque(maxlen=MAX_SPARE)

    def take(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer with anything in it; a new one when there is none like it."""
        for index, buffer in enumerate(self._spare):
            if (buffer.numel(), buffer.dtype, buffer.device) == (num_elements, dtype, device):
                del self._spare[index]
                return buffer
        is_pinned = device.type == "cpu" and torch.cuda.is_initialized()  # on its way to or from a card
        return torch.empty(num_elements, dtype=dtype, device=device, pin_memory=is_pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._spare.append(buffer)


_buffers = Buffers()  # of this process, which is one rank


def pack(tensor: torch.Tensor, signal: float = GO, text: torch.Tensor | None = None) -> torch.Tensor:
    """A flat message: the elements of `tensor`, those of a `text` that travels with it, then GO, STOP or TURN."""
    num_text = 0 if text is None else text.numel()
    message = _buffers.take(tensor.numel() + num_text + 1, tensor.dtype, tensor.device)
    message[: tensor.numel()] = tensor.reshape(-1)
    if text is not None:
        message[tensor.numel() : -1] = text.reshape(-1)
    message[-1] = signal
    return message


def unpack(message: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """The tensor in `message` and its signal."""
    return message[: math.prod(shape)].view(shape), float(message[-1])


def text_in(message: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The text that travels in `message`, as a copy."""
    return message[-1 - math.prod(shape) : -1].view(shape).clone()


class DistributedEdge:
    """An edge over torch.distributed point-to-point messages on a process group of its own, which lie on `device`."""

    def __init__(self, peer: int, group: Any, device: torch.device, timeout_s: float) -> None:
        self._peer, self._group, self._device = peer, group, device
        self.holds_up_the_device = device.type == "cuda"
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        self._posted: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, message: torch.Tensor) -> None:
        if message.device.type != self._device.type:
            given, message = message, _buffers.take(message.numel(), message.dtype, self._device)
            message.copy_(given)
            _buffers.give_back(given)
        # The peer always has the receive of the oldest one posted, so this waits for its work, never for ours.
        while len(self._sent) >= MAX_UNSENT:
            self._await_oldest()
        self._sent.append((self._guard(lambda: dist.isend(message, self._peer, group=self._group)), message))

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        buffer = _buffers.take(num_elements, dtype, self._device)
        self._posted.append((self._guard(lambda: dist.irecv(buffer, self._peer, group=self._group)), buffer))

    def take(self) -> torch.Tensor:
        handle, buffer = self._posted.popleft()
        self._wait(handle)
        return buffer

    def give_back(self, message: torch.Tensor) -> None:
        _buffers.give_back(message)

    def flush(self) -> None:
        while self._sent:
            self._await_oldest()

    def _await_oldest(self) -> None:
        handle, message = self._sent.popleft()
        self._wait(handle)
        _buffers.give_back(message)

    def _wait(self, handle: Any) -> None:
        self._guard(lambda: handle.wait(self._timeout))

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            log.info("message with rank %d failed: %s", self._peer, error)
            raise WorkerDied(f"rank {self._peer} is gone or did not answer in {self._timeout.total_seconds():.0f} s") from error


def edge_device(edge: GridEdge, device: torch.device) -> torch.device:
    """Where the messages of `edge` lie: on the rank's `device`, but for predictions, and latents on their way to the second
    ring, which go through host memory. They are small, and receives are posted far ahead: with NCCL each would be a kernel that
    spins on its card until the message comes."""
    return torch.device("cpu") if edge.is_latents else device


class DistributedLinks:
    """The grid over torch.distributed: one group per directed edge (NCCL serialises each communicator; latents and predictions
    always go over gloo), and a gloo control group over all ranks."""

    def __init__(self, rank: int, grid: Grid, *, device: torch.device, timeout_s: float, key: bytes) -> None:
        """`torch.distributed` must be initialised; a collective call: all ranks make it. `key` is the engine's own, which
        nobody else knows. Raises `WorkerFailed` when somebody in a gloo group does not."""
        self.rank, self.grid = rank, grid
        self._control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        authenticate(self._control, key, "control")
        ends: dict[tuple[int, bool], Edge] = {}  # this rank's, by (ring, whether it sends)
        for edge in grid.edges():
            place, seconds = edge_device(edge, device), timeout_s
            backend = "nccl" if place.type == "cuda" else "gloo"
            if backend == "nccl":  # it counts from the post, and rank 0 may be that many items ahead
                seconds *= 2 * grid.stages + 1
            both = [edge.source, edge.target]
            group = dist.new_group(both, backend=backend, timeout=datetime.timedelta(seconds=seconds))
            if rank not in both:
                continue
            if backend == "gloo":
                authenticate(group, key, f"{edge.source} to {edge.target}")
            peer, is_outgoing = (edge.target, True) if rank == edge.source else (edge.source, False)
            ends[edge.ring, is_outgoing] = DistributedEdge(peer, group, place, seconds)
        own = grid.ring_of(rank) or 0
        self.incoming, self.outgoing = ends.get((own, False)), ends.get((own, True))
        self.beside = RingBeside(ends[1, True], ends[1, False]) if rank == 0 and grid.guidance > 1 else None
        if device.type == "cuda":
            self._warm_up(device, ends)

    def _warm_up(self, device: torch.device, ends: dict[tuple[int, bool], Edge]) -> None:
        """NCCL connects on first use, with both ends waiting: do it in the grid's order, once, before any early receive."""
        for edge in self.grid.edges():
            if self.rank == edge.source:
                ends[edge.ring, True].send(torch.zeros(1, device=device))
                ends[edge.ring, True].flush()
            if self.rank == edge.target:
                ends[edge.ring, False].post(1, torch.float32)
                ends[edge.ring, False].take()
        torch.cuda.synchronize(device)

    def broadcast(self, message: T | None) -> T | None:
        data = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8) if self.rank == 0 else torch.empty(0)
        size = torch.tensor([data.numel()])
        try:
            dist.broadcast(size, src=0, group=self._control)
            if self.rank:
                data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, src=0, group=self._control)
        except RuntimeError as error:
            raise WorkerDied("rank 0 is gone") from error
        return message if self.rank == 0 else decode(bytes(data.numpy()))


class SoloLinks:
    """A ring of one rank: nothing to send."""

    rank, grid = 0, Grid()
    incoming: Edge | None = None
    outgoing: Edge | None = None
    beside: RingBeside | None = None

    def broadcast(self, message: T | None) -> T | None:
        return message
