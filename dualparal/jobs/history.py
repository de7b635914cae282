"""What has become of a job, as a pure fold of its events: engine, page, API, command line, recovery, storage and estimates all
read this, so that they cannot disagree.

Knows no file and no clock: seconds are those that the events tell of. `jobs.facts` reads journals.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dualparal.events import (
    BlockReady,
    Cancelled,
    Event,
    Failed,
    Finished,
    Interrupted,
    Progress,
    Queued,
    Started,
    Steered,
    WrappedUp,
)

STATES = ("queued", "running", "finished", "failed", "cancelled", "interrupted")
ENDED = ("finished", "failed", "cancelled", "interrupted")
CUT_OFF = "EngineError"  # kind of an interruption that was noted at the next start, whenever that was
SLACK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class History:
    """One job so far. `state`: queued, running, finished, failed or cancelled, if somebody holds the job
    (`state_of`). `started` is of the last run, `blocks` are in order, `num_cut_off` interruptions since it last ended.

    `worked_s` are seconds under way, without waiting in line, pauses and nights between two runs; `is_timed` says that all
    of them were measured; `first_frames_s` of them had gone by when the first block was ready.
    """

    state: str = "queued"
    queued: Queued | None = None
    started: Started | None = None
    blocks: tuple[BlockReady, ...] = ()
    final: Event | None = None
    num_runs: int = 0
    num_interruptions: int = 0
    num_cut_off: int = 0
    worked_s: float = 0.0
    is_timed: bool = True
    first_frames_s: float | None = None
    last_s: float = 0.0  # when the last event was told, since the epoch

    @property
    def num_frames(self) -> int:
        """Frames finished."""
        return sum(block.num_frames for block in self.blocks)

    def state_of(self, *, is_held: bool) -> str:
        """One of `STATES`: a job that has not ended and that nobody holds was cut off."""
        return self.state if self.final is not None or is_held else "interrupted"

    def after(self, event: Event) -> History:
        """The history with one more event; Progress tells nothing that lasts."""
        if isinstance(event, Progress):
            return self
        now = self._timed(event)
        match event:
            case Queued():  # while running: it was cut off, and is resumed by hand before anybody noted that
                return replace(now, state="queued", queued=event, final=None, is_timed=now.is_timed and self.state != "running")
            case Started():  # with a notice: told again of the same run
                num_runs = self.num_runs + (not event.notice)
                return replace(now, state="running", started=event, final=None, num_runs=num_runs)
            case BlockReady():
                first_s = now.worked_s if not self.blocks and self.first_frames_s is None else self.first_frames_s
                return replace(now, blocks=_with(self.blocks, event), first_frames_s=first_s)
            case Steered() | WrappedUp() if self.started is not None:
                film = {name: getattr(event, name) for name in ("num_blocks", "num_items", "num_frames")}
                return replace(now, started=replace(self.started, **film))
            case Interrupted():
                num_interruptions, num_cut_off = self.num_interruptions + 1, self.num_cut_off + 1
                return replace(now, state="queued", queued=None, num_interruptions=num_interruptions, num_cut_off=num_cut_off)
            case Finished() | Failed() | Cancelled():
                return replace(now, state=type(event).__name__.lower(), final=event, num_cut_off=0)
        return now

    def _timed(self, event: Event) -> History:
        """The seconds at `event`: as noted in it, or by the times of both events where a journal is older than that."""
        is_cut_off = isinstance(event, Interrupted) and event.kind == CUT_OFF
        worked_s, is_timed = self.worked_s, self.is_timed and not is_cut_off
        if event.worked_s is not None:
            worked_s = event.worked_s
        elif self.state == "running" and not is_cut_off and not isinstance(event, (Queued, Started)):
            is_timed = is_timed and event.time_s >= self.last_s
            worked_s += max(0.0, event.time_s - self.last_s)
            if isinstance(event, Finished) and "total_s" in event.timings and self.num_interruptions == 0:
                is_timed = is_timed and worked_s <= event.timings["total_s"] + SLACK_S
        return replace(self, worked_s=worked_s, is_timed=is_timed, last_s=event.time_s)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a history says of a job that is in some `state`."""

    history: History
    state: str

    @property
    def position(self) -> int | None:
        """Jobs ahead of it in line; None once it runs."""
        if self.state != "queued":
            return None
        return self.history.queued.position if self.history.queued else 0

    @property
    def waits_for(self) -> str:
        """What else it waits for, in a sentence."""
        return self.history.queued.reason if self.state == "queued" and self.history.queued else ""

    @property
    def blocks(self) -> tuple[BlockReady, ...]:
        return self.history.blocks

    @property
    def final(self) -> Event | None:
        return self.history.final


def fold(events: Iterable[Event]) -> History:
    """The history that these events tell, the oldest first."""
    return functools.reduce(History.after, events, History())


def _with(blocks: tuple[BlockReady, ...], event: BlockReady) -> tuple[BlockReady, ...]:
    """A resumed job may tell of a block again."""
    if not blocks or event.block > blocks[-1].block:
        return (*blocks, event)
    known = {block.block: block for block in (*blocks, event)}
    return tuple(known[number] for number in sorted(known))
