"""K and V that wait in host memory between two passes, for `context="cached"` where a card has no room for them.

A block's last pass leaves them layer by layer, its right neighbour's passes bring them back layer by layer: the next layer's
while one runs. A copy is a copy, so the bits are those of K and V that stay. On a GPU copies run on streams of their own
between pinned memory and the card; on a CPU they are plain copies (tests, and the benchmark's lower bound).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from dualparal.model.feature_cache import KeyValue

MAX_LEAVING = 2  # layers whose copies to the host may be under way while a third is being made
MAX_COMING = 2  # layers on the device on their way to attention: the one that runs and the next
LAYERS_ON_DEVICE = MAX_LEAVING + 1 + MAX_COMING


class Ferry:
    """Copies between a device and host memory, one way each on a stream of its own; one for all caches of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._outward: Any = torch.cuda.Stream(device) if self._is_gpu else None
        self._homeward: Any = torch.cuda.Stream(device) if self._is_gpu else None
        self._leaving: deque[tuple[Any, KeyValue]] = deque()  # (event, what must stay alive until then)

    def to_host(self, pair: KeyValue) -> tuple[KeyValue, Any]:
        """A copy of `pair` in host memory, and the event that says when it is there (None: it is)."""
        host = (self._host_like(pair[0]), self._host_like(pair[1]))
        if self._outward is None:
            for there, here in zip(host, pair, strict=True):
                there.copy_(here)
            return host, None
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            for there, here in zip(host, pair, strict=True):
                there.copy_(here, non_blocking=True)
            done = self._outward.record_event()
        while len(self._leaving) >= MAX_LEAVING:  # else a fast device would fill up with what the slow link has not taken
            event, _ = self._leaving.popleft()
            event.synchronize()
        self._leaving.append((done, pair))
        return host, done

    def to_device(self, host: KeyValue, ready: Any) -> tuple[KeyValue, Any]:
        """A copy of `host` on the device, under way; wait for the event before it is used."""
        if self._homeward is None:
            return (host[0].clone(), host[1].clone()), None
        # Made on the stream that will use them, so that their memory is taken up again in that stream's order; the copy must
        # not begin before whoever had that memory is through.
        pair = (torch.empty_like(host[0], device=self.device), torch.empty_like(host[1], device=self.device))
        self._homeward.wait_stream(torch.cuda.current_stream(self.device))
        if ready is not None:
            self._homeward.wait_event(ready)
        with torch.cuda.stream(self._homeward):
            for here, there in zip(pair, host, strict=True):
                here.copy_(there, non_blocking=True)
            return pair, self._homeward.record_event()

    def wait_for(self, event: Any) -> None:
        """What the device is given from now on comes after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def flush(self) -> None:
        """Wait until everything has left the device."""
        while self._leaving:
            event, _ = self._leaving.popleft()
            event.synchronize()

    def _host_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self._is_gpu)


class HostCache(MutableMapping[int, KeyValue]):
    """K and V of one block by layer, in host memory: setting a layer sends it there, taking one brings it and the next."""

    def __init__(self, ferry: Ferry) -> None:
        self._ferry = ferry
        self._host: dict[int, tuple[KeyValue, Any]] = {}
        self._coming: dict[int, tuple[KeyValue, Any]] = {}

    def __setitem__(self, layer: int, pair: KeyValue) -> None:
        self._host[layer] = self._ferry.to_host(pair)

    def __getitem__(self, layer: int) -> KeyValue:
        self.fetch(layer)
        pair, event = self._coming.pop(layer)
        self._ferry.wait_for(event)
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
            self._coming[layer] = self._ferry.to_device(*self._host[layer])

    def in_host_memory(self) -> dict[int, KeyValue]:
        """All layers as they are in host memory, complete."""
        for _, event in self._host.values():
            if event is not None:
                event.synchronize()
        return {layer: pair for layer, (pair, _) in self._host.items()}
