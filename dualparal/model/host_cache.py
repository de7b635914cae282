"""K and V that wait in host memory between two passes, for `context="cached"` where a card has no room for them.

A block's last pass leaves them layer by layer, its right neighbour's passes bring them back layer by layer: the next layer's
while one runs. A copy is a copy, so the bits are those of K and V that stay. On a GPU copies run on streams of their own
between pinned memory and the card; on a CPU they are plain copies (tests, and the benchmark's upper bound).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from dualparal.model.feature_cache import KeyValue

MAX_LEAVING = 2  # layers whose copies to the host may be under way while a third is being made
MAX_COMING = 2  # layers on the device on their way to attention: the one that runs and the next
LAYERS_ON_DEVICE = MAX_LEAVING + 1 + MAX_COMING
MIN_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory, in pieces of a power of two bytes, for that is what PyTorch pins: in one piece the 590 MB of a
    14B layer's K at 720p would take 1074."""

    shape: torch.Size
    pieces: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class HostPair:
    """K and V of one layer in host memory; complete once `ready` has passed (None: it is)."""

    pair: tuple[HostTensor, HostTensor]
    ready: Any


class CacheMover:
    """Copies between a device and host memory, one way each on a stream of its own; one for all caches of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._outward: Any = torch.cuda.Stream(device) if self._is_gpu else None
        self._homeward: Any = torch.cuda.Stream(device) if self._is_gpu else None
        self._leaving: deque[tuple[Any, KeyValue]] = deque()  # (event, what must stay alive until then)

    def to_host(self, pair: KeyValue) -> HostPair:
        """A copy of `pair` in host memory, under way."""
        if self._outward is None:
            return HostPair((self._unload(pair[0]), self._unload(pair[1])), None)
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            host = HostPair((self._unload(pair[0]), self._unload(pair[1])), self._outward.record_event())
        while len(self._leaving) >= MAX_LEAVING:  # else a fast device would fill up with what the slow link has not taken
            event, _ = self._leaving.popleft()
            event.synchronize()
        self._leaving.append((host.ready, pair))
        return host

    def to_device(self, host: HostPair) -> tuple[KeyValue, Any]:
        """A copy of `host` on the device, under way, and the event to `wait_for` before it is used."""
        # Made on the stream that will use them, so that their memory is taken up again in that stream's order; the copy must
        # not begin before whoever had that memory is through.
        k, v = (torch.empty(x.shape, dtype=x.pieces[0].dtype, device=self.device) for x in host.pair)
        if self._homeward is None:
            _load(host.pair[0], k)
            _load(host.pair[1], v)
            return (k, v), None
        self._homeward.wait_stream(torch.cuda.current_stream(self.device))
        self._homeward.wait_event(host.ready)
        with torch.cuda.stream(self._homeward):
            _load(host.pair[0], k)
            _load(host.pair[1], v)
            return (k, v), self._homeward.record_event()

    def wait_for(self, event: Any) -> None:
        """What the device is given from now on comes after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def flush(self) -> None:
        """Wait until everything has left the device."""
        while self._leaving:
            event, _ = self._leaving.popleft()
            event.synchronize()

    def _unload(self, x: torch.Tensor) -> HostTensor:
        flat, pieces, start = x.reshape(-1), [], 0
        while start < len(flat):
            count = _piece_of(len(flat) - start, x.element_size())
            piece = torch.empty(count, dtype=x.dtype, pin_memory=self._is_gpu)
            pieces.append(piece.copy_(flat[start : start + count], non_blocking=True))
            start += count
        return HostTensor(x.shape, tuple(pieces))


def _load(host: HostTensor, x: torch.Tensor) -> None:
    for here, there in zip(x.view(-1).split([len(piece) for piece in host.pieces]), host.pieces, strict=True):
        here.copy_(there, non_blocking=True)


def _piece_of(num_left: int, item_bytes: int) -> int:
    """Elements of the next piece: as many as a power of two bytes hold, all of them once few are left."""
    num_bytes = num_left * item_bytes
    return num_left if num_bytes <= MIN_PIECE_BYTES else (1 << num_bytes.bit_length() - 1) // item_bytes


class HostCache(MutableMapping[int, KeyValue]):
    """K and V of one block by layer, in host memory: setting a layer sends it there, taking one brings it and the next."""

    def __init__(self, mover: CacheMover) -> None:
        self._mover = mover
        self._host: dict[int, HostPair] = {}
        self._coming: dict[int, tuple[KeyValue, Any]] = {}

    def __setitem__(self, layer: int, pair: KeyValue) -> None:
        self._host[layer] = self._mover.to_host(pair)

    def __getitem__(self, layer: int) -> KeyValue:
        self.fetch(layer)
        pair, event = self._coming.pop(layer)
        self._mover.wait_for(event)
        self.fetch(layer + 1)
        return pair

    def __delitem__(self, layer: int) -> None:
        del self._host[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._host)

    def __len__(self) -> int:
        return len(self._host)

    def fetch(self, layer: int) -> None:
        """Begin to bring `layer`, if it is here and not on its way."""
        if layer not in self._coming and layer in self._host:
            self._coming[layer] = self._mover.to_device(self._host[layer])
