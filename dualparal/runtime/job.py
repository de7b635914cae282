"""One job as its caller sees it: events to follow, a snapshot to show, a result to wait for, a way to stop.

Lives in the front end; the engine's supervisor thread feeds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dualparal.errors import JobCancelled, error_from_wire
from dualparal.events import FINAL, BlockReady, Cancelled, Event, Failed, Finished, Interrupted, Progress, Queued, Started
from dualparal.request import GenerationRequest
from dualparal.runtime.claim import Claim
from dualparal.runtime.journal import JobFolder, write_atomically
from dualparal.runtime.locks import SafeCondition
from dualparal.runtime.messages import RunJob, Span
from dualparal.runtime.trace import chrome_trace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
BUSY_WINDOW_S = 5.0
MAX_SPANS = 50_000  # of a job's timeline, the newest: a minute of video on eight ranks has 26,000


@dataclass(frozen=True)
class JobResult:
    """What a finished job leaves. `path` is the mp4; `latents` [1, C, F, h, w] float32 on the CPU when asked for;
    `timings` in seconds as in `Finished`."""

    path: str
    num_frames: int
    timings: dict[str, float]
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class JobView:
    """A snapshot for display. `position` counts the jobs ahead (None once running), `waits_for` says what else a job waits for;
    `timeline` in seconds since submit."""

    state: str
    position: int | None
    started: Started | None
    progress: Progress | None
    blocks: tuple[BlockReady, ...]
    final: Event | None
    timeline: tuple[Span, ...]
    waits_for: str = ""


class Job:
    """A submitted request. All methods may be called from any thread."""

    def __init__(
        self,
        run: RunJob,
        folder: JobFolder,
        owner: str,
        cancel: Callable[[Job], None],
        *,
        on_end: Callable[[Job], None] = lambda _: None,
        claim: Claim | None = None,
    ) -> None:
        """`claim` is given back at the end, before anybody is told of it; `on_end` is called after that, once."""
        self.id = run.job_id
        self.request: GenerationRequest = run.request
        self.owner = owner
        self.folder = folder
        self.run = run
        self.is_stopping = False  # asked to stop while it ran
        self.num_interruptions = 0
        self.num_frames_before = 0  # of an earlier run that this one goes on with
        self._cancel, self._on_end, self._claim = cancel, on_end, claim
        self._changed = SafeCondition()
        self._events: list[Event] = []
        self._queued: Queued | None = None
        self._started: Started | None = None
        self._progress: Progress | None = None
        self._num_progress = 0
        self._unstored: list[Event] = []  # what a full disk has not taken yet
        self._blocks: list[BlockReady] = []
        self._final: Event | None = None
        self._spans: list[Span] = []
        self._latents: Any = None
        self._submitted_s = time.monotonic()
        self._first_frames_s: float | None = None

    @property
    def state(self) -> str:
        """queued, running, finished, failed or cancelled."""
        with self._changed:
            if self._final is not None:
                return type(self._final).__name__.lower()
            return "running" if self._started is not None else "queued"

    def view(self) -> JobView:
        """A consistent snapshot; cheap."""
        with self._changed:
            waiting = self._queued if not self._started and not self._final else None
            return JobView(
                state=self.state,
                position=waiting.position if waiting else None,
                waits_for=waiting.reason if waiting else "",
                started=self._started,
                progress=self._progress,
                blocks=tuple(self._blocks),
                final=self._final,
                timeline=tuple(self._spans),
            )

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """All events from the first on, then new ones as they come; ends after the final one.

        Raises TimeoutError when nothing comes for `timeout` seconds. Of Progress only what is new is kept.
        """
        seen = seen_progress = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(
                    lambda: len(self._events) > seen or self._num_progress > seen_progress,  # noqa: B023
                    timeout,
                ):
                    raise TimeoutError(f"job {self.id}: no event for {timeout} s")
                fresh = self._events[seen:]
                seen += len(fresh)
                if self._num_progress > seen_progress and self._progress is not None:
                    seen_progress = self._num_progress
                    # The final event stays last.
                    fresh.insert(len(fresh) - (bool(fresh) and isinstance(fresh[-1], FINAL)), self._progress)
            for event in fresh:
                yield event
                if isinstance(event, FINAL):
                    return

    def cancel(self) -> None:
        """Stop at the next block step; the finished blocks become a playable mp4. Does nothing once the job has ended."""
        if self._final is None:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end. Raises the job's error, `JobCancelled` after a stop, TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._final is not None, timeout):
                raise TimeoutError(f"job {self.id} has not ended within {timeout} s")
            final = self._final
        if isinstance(final, Finished):
            latents = None
            if self._latents is not None:
                import torch

                latents = torch.from_numpy(self._latents)
            return JobResult(final.path, final.num_frames, final.timings, latents)
        if isinstance(final, Cancelled):
            raise JobCancelled(f"job {self.id} was stopped after {final.num_frames} frames", final.path)
        assert isinstance(final, Failed)
        raise error_from_wire(final.kind, final.message)

    # What follows is for the engine.

    def emit(self, event: Event, *, is_stored: bool = True) -> None:
        """Record an event and wake whoever waits; a job that has ended takes no more."""
        with self._changed:
            if self._final is not None or not self._is_news(event):
                return
            if is_stored:
                self._store(event)
            match event:
                case Queued():
                    self._queued = event
                case Started():
                    self._started = event
                case BlockReady():
                    self._blocks.append(event)
                    if self._first_frames_s is None and is_stored:
                        self._first_frames_s = self.seconds_since_submit()
                case Interrupted():
                    self._started = self._progress = None
                case Finished() | Failed() | Cancelled():
                    with contextlib.suppress(OSError):
                        self.folder.stop_wish.unlink(missing_ok=True)
                    if not self._unstored:  # else nobody may take it for a job that was cut off
                        self.release()
                    self._final = event
            if isinstance(event, Progress):
                self._progress = event
                self._num_progress += 1
            else:
                self._events.append(event)
            self._changed.notify_all()
        if isinstance(event, FINAL):
            self._on_end(self)

    def _is_news(self, event: Event) -> bool:
        """A resumed job comes by the blocks it has again, and most jobs keep their place when the queue moves."""
        if isinstance(event, BlockReady):
            return event.block >= len(self._blocks)
        if isinstance(event, Queued) and self._queued is not None and self._started is None:
            is_moved = (event.position, event.reason) != (self._queued.position, self._queued.reason)
            return is_moved or isinstance(self._events[-1], Interrupted)
        return True

    def interrupt(self, error: Exception) -> None:
        """Note that the job was cut off and will go on from its last saved sweep."""
        self.num_interruptions += 1
        self.run = dataclasses.replace(self.run, is_resumed=True)
        self.emit(Interrupted(job_id=self.id, kind=type(error).__name__, message=str(error)))

    def tell_again(self, blocks: Sequence[BlockReady]) -> None:
        """Take up the blocks that the run before had finished, which are counted as its work."""
        for event in blocks:
            self.emit(event, is_stored=False)
        self.num_frames_before = sum(event.num_frames for event in blocks)

    def add_spans(self, spans: tuple[Span, ...]) -> None:
        """Note when stages worked; times become seconds since submit."""
        start_s = self._submitted_s
        moved = [Span(s.stage, s.start_s - start_s, s.end_s - start_s, s.block, s.step) for s in spans]
        with self._changed:
            self._spans += moved
            if len(self._spans) > MAX_SPANS:
                del self._spans[: len(self._spans) - MAX_SPANS // 2]

    def busy(self, ranks: int) -> tuple[float, ...]:
        """Share of the last seconds in which each stage computed, 0-1."""
        now_s = self.seconds_since_submit()
        since_s = now_s - BUSY_WINDOW_S
        worked = [0.0] * ranks
        with self._changed:
            for span in reversed(self._spans):
                if span.end_s < since_s - 2 * BUSY_WINDOW_S:
                    break
                if span.stage.startswith("stage "):
                    worked[int(span.stage[6:])] += max(0.0, span.end_s - max(span.start_s, since_s))
        return tuple(min(1.0, seconds / BUSY_WINDOW_S) for seconds in worked)

    def keep_latents(self, latents: Any) -> None:
        self._latents = latents

    def seconds_since_submit(self) -> float:
        return time.monotonic() - self._submitted_s

    @property
    def first_frames_s(self) -> float | None:
        """Seconds from submit to the first playable segment."""
        return self._first_frames_s

    @property
    def has_ended(self) -> bool:
        return self._final is not None

    def fail(self, error: Exception, *, is_stored: bool = True, path: str | None = None, num_frames: int = 0) -> None:
        """End the job with `error`."""
        self.emit(
            Failed(job_id=self.id, kind=type(error).__name__, message=str(error), path=path, num_frames=num_frames),
            is_stored=is_stored,
        )

    def _store(self, event: Event) -> None:
        """Append to the journal; a full disk must not take the job down with it."""
        self._unstored.append(event)
        self.store_rest()
        if isinstance(event, FINAL) and self._spans:
            spans = [asdict(span) for span in self._spans]
            try:
                write_atomically(self.folder.path / "timeline.json", json.dumps(spans))
                write_atomically(self.folder.path / "trace.json", json.dumps(chrome_trace(self._spans)))
            except OSError as error:
                log.error("job %s: its timeline could not be stored: %s", self.id, error, extra={"job_id": self.id})

    def store_rest(self) -> bool:
        """Append what could not be appended before, in order; False when something is still left."""
        with self._changed:
            while self._unstored:
                try:
                    self.folder.append(self._unstored[0])
                except OSError as error:
                    if not self.folder.path.is_dir():  # deleted meanwhile
                        self._unstored.clear()
                        break
                    name = type(self._unstored[0]).__name__
                    log.log(
                        logging.DEBUG if self._is_told_of_disk else logging.ERROR,
                        "job %s: event %s could not be stored yet: %s", self.id, name, error, extra={"job_id": self.id},
                    )  # fmt: skip
                    self._is_told_of_disk = True
                    return False
                if isinstance(self._unstored.pop(0), Finished):
                    self.folder.drop_state()  # not before the journal says so: a kill in between must leave one of the two
            if self._final is not None:
                self.release()
            return True

    _is_told_of_disk = False

    def release(self) -> None:
        """Give the claim on the folder back; may be called twice."""
        if self._claim is not None:
            self._claim.release()
