"""Who goes next: an owner's jobs in the order they came, owners in turn, nobody waiting without end.

Turns are those of start-time fair queuing: an owner's next job starts one turn after the last, never before the present one,
so that somebody who has been away gains nothing by it. Owners are only names and can be invented, so a job that has been
overtaken `max_overtakes` times goes first whatever the turns say. Pure: no clock, no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dualparal.errors import QueueFull

T = TypeVar("T")
MAX_OVERTAKES = 32
MAX_REMEMBERED = 256  # owners


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
        twin = self._copy()
        return iter([twin.pop() for _ in range(len(twin))])  # type: ignore[misc]

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
        kept = {o: t for o, t in self._next_turn.items() if t > self._turn or o in self._lines}
        self._next_turn = dict(list(kept.items())[-MAX_REMEMBERED:])

    def _remove(self, entry: _Waiting[T]) -> None:
        line = self._lines[entry.owner]
        line.remove(entry)
        if not line:
            del self._lines[entry.owner]

    def _copy(self) -> JobQueue[T]:
        twin: JobQueue[T] = JobQueue(max_overtakes=self._max_overtakes)
        twin._first = deque(self._first)
        twin._lines = {
            owner: deque(_Waiting(e.number, e.turn, e.owner, e.job, e.num_overtaken) for e in line)
            for owner, line in self._lines.items()
        }
        twin._next_turn, twin._turn = dict(self._next_turn), self._turn
        return twin
