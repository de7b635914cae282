"""What rank 0 sends along its ring, and along the one beside it, and gets back, block step by block step.

Its own ring goes on with what its stage made of the window. Of two rings it runs the conditional halves and the steps without
guidance; the ring beside gets the window itself and runs the unconditional halves, which leave at the same time: one block step
on rank 0 is then two items of the schedule. Receives are posted when a block step leaves, and predictions taken in that order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch

from dualparal.method.grid import Ring
from dualparal.method.schedule import Item, Schedule
from dualparal.ring.stage_loop import RunsItems, SpanLog
from dualparal.ring.texts import TextTrips
from dualparal.ring.transport import Edge, Links, pack

Trips = Mapping[Ring, TextTrips]  # by the ring that they go along


class Rings:
    """The way of one job's block steps through `stage` and the other ranks, and back."""

    def __init__(
        self,
        stage: RunsItems,
        links: Links,
        schedule: Schedule,
        device: torch.device,
        spans: SpanLog,
        trips: Trips | None,
        say: Callable[[int], torch.Tensor] | None,
    ) -> None:
        """`trips` are those of texts that are not announced, and `say` gives one as it travels; predictions are wanted on
        `device`."""
        self._stage, self._links, self._device, self._spans, self._say = stage, links, device, spans, say
        self._own, self._beside = links.grid.rings[0], links.beside
        self._most = 2 * links.grid.stages
        self._under_way: deque[Item] = deque()  # the last item of each block step
        self._made: deque[torch.Tensor] = deque()  # what this rank alone has made, of those
        self.follow(schedule, trips)

    def follow(self, schedule: Schedule, trips: Trips | None) -> None:
        """Go on by this schedule."""
        self._schedule, self._trips = schedule, trips

    @property
    def is_empty(self) -> bool:
        """Whether no block step is under way."""
        return not self._under_way

    @property
    def is_full(self) -> bool:
        """Whether enough block steps are under way to keep every stage busy."""
        return len(self._under_way) >= self._most

    def has_left(self, item: Item) -> bool:
        """Whether `item` left with the one before it."""
        return self._beside is not None and item.half == 1

    def start(self, item: Item, window: torch.Tensor) -> torch.Tensor | None:
        """Let `item` leave with its window's latents [1, C, F, h, w], of two rings with its other half. Returns the prediction
        where nobody else has a part in it, else None: `take` waits for it."""
        last = item
        if self._beside is not None and item.half == 0:  # first: others work on it while this rank does on its own
            last = self._schedule.items[item.index + 1]
            _, said = self._said(last, 1)
            self._beside.outgoing.send(pack(window, text=said))
            self._beside.incoming.post(self._prediction_size(last), torch.float32)
        text, said = self._said(item, self._own)
        if text is not None and said is not None:
            self._stage.hear(text, said)
        with self._spans.working(item):
            out = self._stage.run(item, window)
        if self._links.outgoing is not None:
            assert out is not None and self._links.incoming is not None
            self._links.outgoing.send(pack(out, text=said))
            if last.is_whole:  # of two halves on one ring the first has no prediction
                self._links.incoming.post(self._prediction_size(item), torch.float32)
        elif self._beside is None:
            return out
        else:  # predictions are taken in the order in which block steps left
            assert out is not None
            self._made.append(out)
        if last.is_whole:
            self._under_way.append(last)
        return None

    def take(self) -> tuple[Item, torch.Tensor]:
        """The last item of the oldest block step under way, and its prediction [1, C, own F, h, w] float32."""
        item = self._under_way.popleft()
        own = self._made.popleft() if self._links.incoming is None else self._taken(self._links.incoming, item)
        if not self.has_left(item):
            return item, own
        assert self._beside is not None
        uncond = self._taken(self._beside.incoming, item)
        with torch.inference_mode():
            return item, self._stage.combine(item, own, uncond)

    def end(self, index: int, signal: float) -> None:
        """Every rank leaves at the item `index`, or the next one of its ring: the message has the size it would have had, so
        that posted receives match."""
        if self._links.outgoing is not None and (item := self._awaited(self._own, index)) is not None:
            size = math.prod(self._stage.hidden_shape(item)) + self._text_size(item, self._own)
            self._send_end(self._links.outgoing, size, self._stage.dtype, signal)
        if self._beside is not None and (item := self._awaited(1, index)) is not None:
            shape, dtype = self._stage.incoming(item)  # of a first stage, as this one is
            self._send_end(self._beside.outgoing, math.prod(shape) + self._text_size(item, 1), dtype, signal)

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        if self._links.outgoing is not None:
            self._links.outgoing.flush()
        if self._beside is not None:
            self._beside.outgoing.flush()

    def _said(self, item: Item, ring: Ring) -> tuple[int, torch.Tensor] | tuple[None, None]:
        """The text that travels with `item`, and its number."""
        if self._trips is None or (text := self._trips[ring].of(item)) is None:
            return None, None
        assert self._say is not None
        return text, self._say(text)

    def _prediction_size(self, item: Item) -> int:
        return math.prod(self._stage.prediction_shape(item)) + 1

    def _taken(self, edge: Edge, item: Item) -> torch.Tensor:
        message = edge.take()
        prediction = message[:-1].view(self._stage.prediction_shape(item))
        if message.device.type != self._device.type:  # it came through host memory
            prediction = prediction.to(self._device)
            edge.give_back(message)
        return prediction

    def _awaited(self, ring: Ring, index: int) -> Item | None:
        return next(iter(self._schedule.on_ring(ring, index)), None)

    def _text_size(self, item: Item, ring: Ring) -> int:
        return 0 if self._trips is None else self._trips[ring].num_elements(self._trips[ring].of(item))

    def _send_end(self, edge: Edge, size: int, dtype: torch.dtype, signal: float) -> None:
        edge.send(pack(torch.zeros(size, dtype=dtype, device=self._device), signal))
