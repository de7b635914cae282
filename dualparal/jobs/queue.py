"""Who goes next: an owner's jobs in the order they came, owners in turn, nobody waiting without end.

Turns are those of start-time fair queuing: an owner's next job starts one turn after the last, never before the present one,
so that somebody who has been away gains nothing by it. Owners are only names and can be invented, so a job that has been
overtaken `max_overtakes` times goes first whatever the turns say. Pure: no clock, no thread.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dualparal.errors import QueueFull

T = TypeVar("T")
MAX_OVERTAKES = 32
MAX_REMEMBERED = 256  # owners who do not wait


@dataclass
class _Waiting(Generic[T]):
    number: int  # of arrival
    turn: int  # when it arrived
    owner: Hashable
    job: T
    num_overtaken: int = 0


class JobQueue(Generic[T]):
    """Waiting jobs. Iterating gives the order in which `pop` would hand them out if nothing else came."""

    def __init__(self, *, max_jobs: int = 32, max_per_owner: int | None = None, max_overtakes: int = MAX_OVERTAKES) -> None:
        """At most `max_jobs` wait; an owner has at most `max_per_owner` jobs waiting and running (None: no such limit)."""
        self.max_jobs, self.max_per_owner = max_jobs, max_per_owner
        self._max_overtakes = max_overtakes
        self._first: deque[T] = deque()  # interrupted jobs: they had their turn already
        self._lines: dict[Hashable, deque[_Waiting[T]]] = {}
        self._next_turn: dict[Hashable, int] = {}  # of owners that wait, or for whom it lies ahead
        self._turn = 0
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._lines.values()))

    def __contains__(self, job: object) -> bool:
        return job in self._first or any(entry.job == job for line in self._lines.values() for entry in line)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._order()))

    def _order(self) -> Iterator[T]:
        """As if by `pop` after `pop`, in n log n steps: a head's start changes with its own line only, and the oldest has been
        overtaken by all that went but those older than itself."""
        yield from list(self._first)
        by_age = sorted((entry for line in self._lines.values() for entry in line), key=lambda entry: entry.number)
        lines = {owner: iter(line) for owner, line in self._lines.items()}
        heads = [(self._start(entry := next(line)), entry.number, entry) for line in lines.values()]
        heapq.heapify(heads)
        starts = {number: start for start, number, _ in heads}
        gone: set[int] = set()
        oldest = 0
        for num_gone in range(len(by_age)):
            while by_age[oldest].number in gone:
                oldest += 1
            chosen = by_age[oldest]
            if chosen.num_overtaken + num_gone - oldest < self._max_overtakes:
                while heads[0][1] in gone:
                    heapq.heappop(heads)
                chosen = heads[0][2]
            gone.add(chosen.number)
            yield chosen.job
            if (after := next(lines[chosen.owner], None)) is not None:
                starts[after.number] = max(after.turn, starts[chosen.number] + 1)
                heapq.heappush(heads, (starts[after.number], after.number, after))

    def check_room(self, owner: Hashable, num_running: int = 0, *, num_elsewhere: int = 0) -> None:
        """Raise `QueueFull` unless `owner`, of whom `num_running` jobs are at work (or wait elsewhere), may add one;
        `num_elsewhere` jobs wait outside this queue and count with it."""
        if (num_waiting := len(self) + num_elsewhere) >= self.max_jobs:
            raise QueueFull(f"{num_waiting} jobs are waiting, the most there may be; try again later")
        num_open = num_running + len(self._lines.get(owner, ()))
        if self.max_per_owner is not None and num_open >= self.max_per_owner:
            raise QueueFull(
                f"you have {num_open} jobs waiting or running, the most one person may have; wait for one to end or stop one"
            )

    def push(self, job: T, owner: Hashable) -> None:
        """Add a job at the end of its owner's line. Does not ask `check_room`: what was accepted once is taken back."""
        self._num_arrived += 1
        self._lines.setdefault(owner, deque()).append(_Waiting(self._num_arrived, self._turn, owner, job))

    def push_first(self, job: T) -> None:
        """Add a job that had its turn and was interrupted: it goes before all others."""
        self._first.append(job)

    def put_back(self, job: T) -> None:
        """Return a job just popped: it stays the next."""
        self._first.appendleft(job)

    def pop(self, is_free: Callable[[T], bool] = lambda _: True) -> T | None:
        """Remove and return the job whose turn it is; None when nothing waits. A job that is not free blocks its owner only."""
        for job in self._first:
            if is_free(job):
                self._first.remove(job)
                return job
        heads = [line[0] for line in self._lines.values() if is_free(line[0].job)]
        if not heads:
            return None
        chosen = min(heads, key=lambda entry: entry.number)
        if chosen.num_overtaken < self._max_overtakes:
            chosen = min(heads, key=lambda entry: (self._start(entry), entry.number))
        start = self._start(chosen)
        self._remove(chosen)
        for line in self._lines.values():
            for entry in line:
                entry.num_overtaken += entry.number < chosen.number
        self._turn = max(self._turn, start)
        self._remember(chosen.owner, start + 1)
        return chosen.job

    def remove(self, job: T) -> bool:
        """Take a job out; False when it does not wait."""
        if job in self._first:
            self._first.remove(job)
            return True
        for line in list(self._lines.values()):
            for entry in list(line):
                if entry.job == job:
                    self._remove(entry)
                    return True
        return False

    def clear(self) -> None:
        """Take everything out."""
        self._first.clear()
        self._lines.clear()

    def _start(self, entry: _Waiting[T]) -> int:
        return max(entry.turn, self._next_turn.get(entry.owner, 0))

    def _remember(self, owner: Hashable, turn: int) -> None:
        self._next_turn.pop(owner, None)
        self._next_turn[owner] = turn  # the newest last
        waiting = {o: t for o, t in self._next_turn.items() if o in self._lines}
        others = [(o, t) for o, t in self._next_turn.items() if t > self._turn and o not in self._lines]
        self._next_turn = {**waiting, **dict(others[-MAX_REMEMBERED:])}

    def _remove(self, entry: _Waiting[T]) -> None:
        line = self._lines[entry.owner]
        line.remove(entry)
        if not line:
            del self._lines[entry.owner]
