"""Who may touch what, and when: the order that streams, events and waits of the host put on the fake card's work.

Vector clocks: each stream and the host has one, with a number for every stream. Work given to a stream comes after all that was
given to it before, after what it was told to wait for, and after all that the host knew to be done. A storage remembers who
last wrote it and who has read it since. Whoever touches it without coming after those is noted as a race, with the line; so is
memory that is let go while another stream may be at it, for the allocator gives it to its own stream's next tensor at once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_cuda.card import CARD, COPIES, MADE, READS, functions, line

Clock = dict[str, int]
HOST = "host"
_aten = torch.ops.aten
_NO_WORK = {_aten.detach, _aten._has_compatible_shallow_copy_type}


def join(clock: Clock, other: Clock) -> None:
    for who, when in other.items():
        clock[who] = max(clock.get(who, 0), when)


@dataclass(eq=False)
class Stream:
    """Stands for `torch.cuda.Stream`, and for the host."""

    order: Order
    name: str
    clock: Clock = field(default_factory=dict)

    def tick(self) -> None:
        """Something new is given to it, now."""
        join(self.clock, self.order.host.clock)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1

    def wait_stream(self, other: Stream) -> None:
        self.order.wait("wait_stream", self, other.clock)

    def record_event(self) -> Event:
        return Event(self.order, dict(self.clock))

    def wait_event(self, event: Event) -> None:
        self.order.wait("wait_event", self, event.clock)

    def synchronize(self) -> None:
        self.order.wait("synchronize", self.order.host, self.clock)


@dataclass(eq=False)
class Event:
    """Stands for `torch.cuda.Event`, and for the handle of a message on its way; `blocks`: waiting for it holds the host up."""

    order: Order
    clock: Clock
    blocks: bool = False

    def synchronize(self) -> None:
        self.order.wait("synchronize", self.order.host, self.clock)

    def wait(self, *_: Any) -> None:
        self.order.wait("wait", self.order.host if self.blocks else self.order.current, self.clock)


@dataclass
class Uses:
    """Of one storage: `owner` the stream that its memory is given back to."""

    owner: str
    wrote: tuple[str, int]
    read: Clock = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)


class Order(TorchDispatchMode):
    """The order of all that is done inside; `races` are the lines that it does not cover."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Stream(self, HOST)
        self.current = Stream(self, "compute")
        self.races: list[str] = []
        self.waits: set[str] = set()  # that there were: the two innermost functions of the project, and what waits
        self.without: frozenset[str] = frozenset()  # those that are left out
        self._uses: dict[int, Uses] = {}
        self._streams = {HOST: self.host, "compute": self.current}
        self._numbers: dict[str, int] = defaultdict(int)

    def new_stream(self, name: str = "stream") -> Stream:
        self._numbers[name] += 1
        stream = Stream(self, f"{name} {self._numbers[name]}")
        self._streams[stream.name] = stream
        return stream

    def wait(self, what: str, who: Stream, clock: Clock) -> None:
        """`who` comes after `clock` from now on, unless it is a wait to be left out."""
        wait = " ".join([*functions(), what])
        if wait != what:  # else it is a test's own
            self.waits.add(wait)
        if wait not in self.without:
            join(who.clock, clock)

    def touch(self, who: Stream, x: torch.Tensor, *, writes: bool) -> None:
        """What `who` was given last reads or writes `x`."""
        uses, now = self._uses_of(x, who), who.clock
        before = [uses.wrote, *(uses.read.items() if writes else ())]
        if late := [other for other, when in before if other != who.name and now.get(other, 0) < when]:
            self.races.append(f"{line()} {'writes' if writes else 'reads'} on {who.name} what {', '.join(late)} is at")
        if writes:
            uses.wrote, uses.read = (who.name, now.get(who.name, 0)), {}
        else:
            uses.read[who.name] = now.get(who.name, 0)

    def _uses_of(self, x: torch.Tensor, who: Stream) -> Uses:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._uses:
            owner = self.current if x.device == CARD else self.host
            # Its memory may have been somebody's until now: nobody but its own stream, and who comes after that, may have it.
            self._uses[key] = Uses(owner.name, (owner.name, owner.clock.get(owner.name, 0)))
            weakref.finalize(storage, self._gone, key)
        return self._uses[key]

    def _gone(self, key: int) -> None:
        uses = self._uses.pop(key)
        known = dict(self._streams[uses.owner].clock)
        join(known, self.host.clock)
        at_it = {uses.wrote[0]: uses.wrote[1], **uses.read}
        late = [who for who, when in at_it.items() if known.get(who, 0) < when and who not in uses.recorded]
        if uses.owner == HOST:  # the allocator of pinned memory waits for the card by itself
            late = [who for who in late if who.startswith("gloo")]
        if late:
            self.races.append(f"{line()} lets go on {uses.owner} what {', '.join(late)} is at")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten" or func.overloadpacket in _NO_WORK:
            return out
        named = {argument.name: argument for argument in func._schema.arguments}
        given = [*zip(func._schema.arguments, args, strict=False), *((named[key], x) for key, x in (kwargs or {}).items())]
        written = [x for spec, value in given if spec.alias_info and spec.alias_info.is_write for x in _tensors(value)]
        read = [x for spec, value in given if not (spec.alias_info and spec.alias_info.is_write) for x in _tensors(value)]
        made = [x for x in _tensors(out) if not any(x is one for one in written)]
        is_on_card = any(x.device == CARD for x in (*written, *read, *made))
        who = self.current if is_on_card else self.host
        if func.overloadpacket in MADE:
            for x in made:
                self._uses_of(x, who)
            return out
        who.tick()
        for x in read:
            self.touch(who, x, writes=False)
        for x in (*written, *made):
            self.touch(who, x, writes=True)
        crosses = func.overloadpacket in COPIES and len({x.device.type for x in (*written, *read, *made)}) == 2
        if crosses:
            crosses = not (kwargs or {}).get("non_blocking") and args[2:] != (True,)  # and the host waits for it
        if who is not self.host and (crosses or func.overloadpacket in READS):
            self.wait(func.overloadpacket.__name__, self.host, who.clock)
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def in_order(patch: pytest.MonkeyPatch) -> Iterator[Order]:
    """Inside a `fake_card`, whose streams and pinned memory it stands for."""
    order, made = Order(), torch.empty

    @contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before, order.current = order.current, stream or order.current
        yield
        order.current = before

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return made(*size, **options)

    patch.setattr(torch, "empty", unpinned)
    patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    patch.setattr(torch.Tensor, "is_pinned", lambda x: x.device.type == "cpu")
    patch.setattr(torch.cuda, "Stream", lambda *_: order.new_stream())
    patch.setattr(torch.cuda, "stream", on)
    patch.setattr(torch.cuda, "current_stream", lambda *_: order.current)
    patch.setattr(torch.cuda, "synchronize", lambda *_: [one.synchronize() for one in [*order._streams.values()]])
    patch.setattr(torch.Tensor, "record_stream", lambda x, stream: order._uses_of(x, stream).recorded.add(stream.name))
    with order:
        yield order
