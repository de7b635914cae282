"""What crosses the border between the front end and the processes that host the other ranks under torchrun, besides the
workers' own messages (`dualparal.messages`).

    front end ─ StartRank, StopRank, Farewell ─► host ─ Hello, RankBegun, RankEnded ─► front end
"""

from __future__ import annotations

from dataclasses import dataclass

from dualparal.messages import WorkerOptions


@dataclass(frozen=True)
class Hello:
    """A host's first message: whose worker it will run, and what it calls itself."""

    rank: int
    host: str


@dataclass(frozen=True)
class StartRank:
    """Front end to a host: start the rank's worker, in place of any older one. `sent_s`: the front end's monotonic clock."""

    generation: int
    options: WorkerOptions
    sent_s: float


@dataclass(frozen=True)
class StopRank:
    """Front end to a host: kill the rank's worker."""


@dataclass(frozen=True)
class RankBegun:
    """A host to the front end: from here on messages are those of the worker of `generation`."""

    generation: int


@dataclass(frozen=True)
class RankEnded:
    """A host to the front end: the worker of `generation` is gone; `exitcode` as multiprocessing has it."""

    generation: int
    exitcode: int


@dataclass(frozen=True)
class Farewell:
    """Front end to a host: all is done, or somebody else hosts this rank now. `reason` is for its log."""

    reason: str
