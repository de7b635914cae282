"""One job as its caller sees it: events to follow, a snapshot to show, a result to wait for, a way to stop.

Lives in the front end; the engine's supervisor thread feeds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dualparal.errors import DualParalError, JobCancelled, RequestError, error_from_wire
from dualparal.events import (
    FINAL,
    BlockReady,
    Cancelled,
    Event,
    Failed,
    Finished,
    Interrupted,
    Look,
    Progress,
    Queued,
    Started,
    Steered,
    WrappedUp,
)
from dualparal.jobs.claim import Claim
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import History, Standing
from dualparal.jobs.journal import Journal
from dualparal.jobs.looks import Looks
from dualparal.jobs.timeline import Timeline
from dualparal.jobs.wishes import Wishes
from dualparal.locks import SafeCondition
from dualparal.messages import Finish, Played, RunJob, Span, Steer, SteerAnswer
from dualparal.prompts import shot_from_here
from dualparal.request import Settings

if TYPE_CHECKING:
    import torch

CUT_OFF = "the job was cut off before the new prompt was taken; steer it again once it runs"


@dataclass(frozen=True)
class JobResult:
    """What a finished job leaves. `path` is the mp4; `latents` [1, C, F, h, w] float32 on the CPU when asked for;
    `timings` in seconds as in `Finished`."""

    path: str
    num_frames: int
    timings: dict[str, float]
    latents: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class JobView(Standing):
    """A snapshot for display. `timeline` in seconds since submit, until the job has ended and it is on disk."""

    progress: Progress | None
    timeline: tuple[Span, ...]
    looks: Mapping[int, Look] = field(default_factory=dict)  # the newest of each block

    @property
    def begun(self) -> float:
        """Blocks that have begun for each that is ready; 1 before the first is. Decoding may be far behind."""
        if self.progress is None or not self.blocks:
            return 1.0
        return max(1.0, sum(steps > 0 for steps in self.progress.block_steps) / len(self.blocks))


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
        steer: Callable[[Job, Steer | Finish | Played], None] | None = None,
    ) -> None:
        """`claim` is given back at the end, before anybody is told of it; `on_end` is called after that, once. `steer` takes a
        wish to rank 0, or answers it."""
        self.id = run.job_id
        self.request: Settings = run.request
        self.owner = owner
        self.created_s = time.time()
        self.is_baseline = run.is_baseline
        self.folder = folder
        self.run = run
        self.is_stopping = False  # asked to stop while it ran
        self.num_interruptions = 0
        self.num_frames_before = 0  # of an earlier run that this one goes on with
        self._cancel, self._on_end, self._claim, self._steer = cancel, on_end, claim, steer
        self._changed = SafeCondition()
        self._wishes = Wishes(self._changed)
        self._submitted_s = time.monotonic()
        self.timeline = Timeline(self._submitted_s)
        self._events: list[Event] = []
        self._history = History()
        self._since_s: float | None = None  # when this run began; None while it waits
        self._progress: Progress | None = None
        self._num_progress = 0
        self._journal = Journal(folder)
        self._looks = Looks(folder)
        self._latents: Any = None
        self._first_frames_s: float | None = None

    @property
    def state(self) -> str:
        """queued, running, finished, failed or cancelled."""
        return self._history.state

    def view(self) -> JobView:
        """A consistent snapshot; cheap."""
        with self._changed:
            return JobView(
                history=self._history, state=self.state, progress=self._progress, timeline=self.timeline.spans,
                looks=self._looks.seen(),
            )  # fmt: skip

    def events(self, timeout: float | None = None, *, looks: bool = False) -> Iterator[Event]:
        """All events from the first on, then new ones as they come; ends after the final one.

        Raises TimeoutError when nothing comes for `timeout` seconds. Of Progress only what is new is kept, and so of each
        block's `Look`, which come with `looks` only.
        """
        seen = seen_progress = seen_looks = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(
                    lambda: (
                        len(self._events) > seen  # noqa: B023
                        or self._num_progress > seen_progress  # noqa: B023
                        or (looks and self._looks.num_taken > seen_looks)  # noqa: B023
                    ),
                    timeout,
                ):
                    raise TimeoutError(f"job {self.id}: no event for {timeout} s")
                fresh = self._events[seen:]
                seen += len(fresh)
                if self._num_progress > seen_progress and self._progress is not None:
                    seen_progress = self._num_progress
                    # The final event stays last.
                    fresh.insert(len(fresh) - (bool(fresh) and isinstance(fresh[-1], FINAL)), self._progress)
                if looks:
                    at = len(fresh) - (bool(fresh) and isinstance(fresh[-1], FINAL))
                    fresh[at:at], seen_looks = self._looks.since(seen_looks), self._looks.num_taken
            for event in fresh:
                yield event
                if isinstance(event, FINAL):
                    return

    def cancel(self) -> None:
        """Stop at the next block step; the finished blocks become a playable mp4. Does nothing once the job has ended."""
        if not self.has_ended:
            self._cancel(self)

    def steer(self, prompt: str, transition: str | None = None, *, timeout: float | None = None) -> Steered:
        """From the first block on that has not entered the pipeline yet, show `prompt` instead of all that was to come; it is
        put behind what the whole film shows, if that has shots. `transition` is switch (default), blend or cut. The film keeps
        its length.

        Waits until that is so, a few block steps, and says from which second on. Raises `RequestError` where it is refused, as
        when all blocks have entered; TimeoutError after `timeout` seconds.
        """
        shot = shot_from_here(prompt, transition)
        if self.is_baseline or self._steer is None:
            raise RequestError("plain Wan takes one prompt; steer a video that is made block by block", "prompt")
        if self.state != "running":
            raise RequestError(f"job {self.id} is {self.state}; only a running job can be steered", "job_id")
        number = self._wishes.open()
        self._steer(self, Steer(self.id, number, shot))
        if self.state != "running":  # it was cut off meanwhile, and perhaps before the wish was noted
            self._wishes.refuse_all(CUT_OFF)
        told = self._wishes.wait(number, timeout)
        assert isinstance(told, Steered)
        return told

    def finish(self, *, timeout: float | None = None) -> WrappedUp:
        """Let no further block of an endless film enter: those in flight are completed, and the film ends there.

        Waits until that is settled, a few block steps, and says how long it will be. Raises `RequestError` where there is
        nothing to wrap up; TimeoutError after `timeout` seconds.
        """
        if self._steer is None or not self.request.is_endless:
            raise RequestError(f"job {self.id} makes a film that has an end; only an endless one is wrapped up", "job_id")
        if self.state != "running":
            raise RequestError(f"job {self.id} is {self.state}; only a running film is wrapped up", "job_id")
        number = self._wishes.open()
        self._steer(self, Finish(self.id, number))
        if self.state != "running":
            self._wishes.refuse_all(CUT_OFF)
        told = self._wishes.wait(number, timeout)
        assert isinstance(told, WrappedUp)
        return told

    def tell_played(self, seconds: float) -> None:
        """Somebody watches the film while it is made and has seen its first `seconds`: an endless one lets no block enter while
        more than its `lead` is unplayed. To be told every few seconds; after fifteen without it the film goes on freely."""
        if self._steer is not None and self.request.is_endless and self.state == "running":
            self._steer(self, Played(self.id, max(0.0, seconds)))

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end. Raises the job's error, `JobCancelled` after a stop, TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_ended, timeout):
                raise TimeoutError(f"job {self.id} has not ended within {timeout} s")
            final = self._history.final
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

    def take_answer(self, answer: SteerAnswer) -> None:
        """Note how rank 0 has answered a wish, and the timeline that it follows from now on."""
        if answer.timeline is not None:
            self._go_by(answer.timeline)
        if answer.steered is not None:
            self.emit(answer.steered)
        self._wishes.answer(answer)

    def _go_by(self, request: Settings) -> None:
        with self._changed:
            self.request, self.run = request, dataclasses.replace(self.run, request=request)

    def emit(self, event: Event, *, is_stored: bool = True) -> None:
        """Record an event and wake whoever waits; a job that has ended takes no more."""
        with self._changed:
            if self.has_ended or not self._is_news(event):
                return
            event = self._timed(event)
            if is_stored:
                self._store(event)
            match event:
                case BlockReady():
                    if self._first_frames_s is None and is_stored:
                        self._first_frames_s = self.seconds_since_submit()
                case Interrupted():
                    self._progress = None
                case Finished() | Failed() | Cancelled():
                    with contextlib.suppress(OSError):
                        self.folder.stop_wish.unlink(missing_ok=True)
                    if not self._journal.is_owing:  # else nobody may take it for a job that was cut off
                        self.release()
            self._history = self._history.after(event)
            if isinstance(event, Progress):
                self._progress = event
                self._num_progress += 1
            else:
                self._events.append(event)
            self._changed.notify_all()
        if isinstance(event, FINAL):
            self._wishes.refuse_all(f"job {self.id} has ended; there is nothing left to steer")
            self._on_end(self)

    def show(self, look: Look) -> None:
        """Take a look; a job that has ended takes no more. It is no part of the job's history."""
        with self._changed:
            if not self.has_ended:
                self._looks.take(look)
                self._changed.notify_all()

    def _is_news(self, event: Event) -> bool:
        """A resumed job comes by the blocks it has again, and most jobs keep their place when the queue moves."""
        if isinstance(event, BlockReady):
            return event.block >= len(self._history.blocks)
        if isinstance(event, Queued) and self.state == "queued" and (before := self._history.queued) is not None:
            return (event.position, event.reason) != (before.position, before.reason)
        return True

    def _timed(self, event: Event) -> Event:
        """The event with the seconds worked until then, by a clock that nobody sets."""
        worked_s = self._history.worked_s
        if isinstance(event, Progress):
            return event
        if self._since_s is not None:
            worked_s = self._worked_before_s + time.monotonic() - self._since_s
        if isinstance(event, Started):
            self._since_s, self._worked_before_s = time.monotonic(), worked_s
        elif isinstance(event, (Interrupted, *FINAL)):
            self._since_s = None
        return dataclasses.replace(event, worked_s=worked_s)

    _worked_before_s = 0.0  # when this run began

    def interrupt(self, error: Exception) -> None:
        """Note that the job was cut off and will go on from its last saved sweep."""
        self.num_interruptions += 1
        self.run = dataclasses.replace(self.run, is_resumed=True)
        with contextlib.suppress(DualParalError):  # a timeline that nobody was left to tell of
            self._go_by(self.folder.request())
        self._wishes.refuse_all(CUT_OFF)
        self.emit(Interrupted(job_id=self.id, kind=type(error).__name__, message=str(error)))

    def take_up(self, before: History, blocks: Sequence[BlockReady]) -> None:
        """Go on from what an earlier run told, of whose blocks these are still there; they are counted as its work."""
        with self._changed:
            self._history = dataclasses.replace(before, state="queued", queued=None, final=None, blocks=tuple(blocks))
            self._events += blocks
            self._changed.notify_all()
        self.num_frames_before = sum(event.num_frames for event in blocks)

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
        return self._history.final is not None

    def fail(self, error: Exception, *, is_stored: bool = True, path: str | None = None, num_frames: int = 0) -> None:
        """End the job with `error`."""
        self.emit(
            Failed(job_id=self.id, kind=type(error).__name__, message=str(error), path=path, num_frames=num_frames),
            is_stored=is_stored,
        )

    def _store(self, event: Event) -> None:
        self._journal.add(event)
        self.store_rest()
        if isinstance(event, FINAL):
            self.timeline.store(self.folder.path)

    def store_rest(self) -> bool:
        """Store what a full disk has not taken before; False when something is still left."""
        with self._changed:
            is_stored = self._journal.store()
            if is_stored and self.has_ended:
                self.release()
            return is_stored

    def release(self) -> None:
        """Give the claim on the folder back; may be called twice."""
        if self._claim is not None:
            self._claim.release()
