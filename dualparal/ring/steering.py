"""Steering: a job under way takes up another timeline (METHOD.md, "Prompts over time"): a new text, the end of an endless
film, or more blocks of one before the last that is planned enters.

The new text is encoded while block steps go on. Before the next of them the timeline is cut at the first block that has not
entered, written to the job's folder, and only then followed: a job that is killed meanwhile goes on by what is written there,
and every sweep that was saved is one of both timelines. Runs on rank 0; knows no stage.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dualparal.errors import RequestError
from dualparal.events import Steered, WrappedUp
from dualparal.files import STEERED, write_record
from dualparal.messages import TOO_LATE, Finish, RunJob, Steer, SteerAnswer
from dualparal.method.endless import extended, wrapped_up
from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Item, Schedule, make_schedule
from dualparal.method.timeline import steered
from dualparal.prompts import text_of_shot
from dualparal.request import Settings
from dualparal.ring.encoding import Encoding

HAS_END = "the film has an end already; stop it to have it end sooner"
HAS_TENSORS = "the job was given tensors for the timeline that it began with; submit it without them"


class Steering:
    """What one job is steered to. `job` has the timeline that is followed."""

    def __init__(
        self, job: RunJob, encoding: Encoding, answer: Callable[[SteerAnswer], None], check: Callable[[Settings], None]
    ) -> None:
        """`check` raises `RequestError` for what the model does not take."""
        self.job = job
        self._encoding, self._answer, self._check = encoding, answer, check
        self._wishes: deque[Steer] = deque()
        self._finish: deque[Finish] = deque()
        self._is_encoding = False  # the first of them

    def ask(self, wish: Steer | Finish) -> None:
        """Take a wish; it is answered when it is followed or refused."""
        if isinstance(wish, Finish):
            self._finish.append(wish)
        elif any(given is not None for given in (self.job.latents, self.job.prompt_embeds, self.job.negative_prompt_embeds)):
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=HAS_TENSORS))
        else:
            self._wishes.append(wish)

    def is_due(self, item: Item, schedule: Schedule) -> bool:
        """Whether `job` has a new timeline, to be followed from `item` of `schedule` on."""
        plan, request = schedule.plan, self.job.request
        is_last_entering = request.is_endless and item.block + 1 == plan.num_blocks and item.step == 0
        if not self._wishes and not self._finish and not is_last_entering:
            return False
        block = 1 + max((before.block for before in schedule.items[: item.index]), default=-1)
        if self._finish:
            wish = self._finish.popleft()
            if request.is_endless:
                return self._try(wish, lambda: self._wrap_up(wish, block, schedule))
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=HAS_END))
        if is_last_entering:
            self._follow(extended(request, plan), schedule)
            self._answer(SteerAnswer(self.job.job_id, 0, timeline=self.job.request))
            return True
        return self._is_steered(block, schedule)

    def _is_steered(self, block: int, schedule: Schedule) -> bool:
        if not self._wishes:
            return False
        if block == schedule.plan.num_blocks:
            self.refuse_all()
            return False
        wish = self._wishes[0]
        if not self._is_encoding:  # not when it came: rank 0 may have been waiting for other things of the codec's
            self._encoding.ask(wish.job_id, self._text(wish))
            self._is_encoding = True
        is_there, notice = self._encoding.has(wish.job_id, self._text(wish))
        if not is_there:
            return False
        self._wishes.popleft()
        self._is_encoding = False
        return self._try(wish, lambda: self._steer(wish, block, schedule, notice))

    def _try(self, wish: Steer | Finish, follow: Callable[[], None]) -> bool:
        """Whether the wish was followed; else it is refused."""
        try:
            follow()
        except (RequestError, OSError) as error:
            why = str(error) if isinstance(error, RequestError) else f"the new timeline cannot be stored: {error.strerror}"
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=why))
            return False
        return True

    def refuse_all(self) -> None:
        """Nothing that has not entered is left."""
        left: list[Steer | Finish] = [*self._wishes, *self._finish]
        for wish in left:
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=TOO_LATE))
        self._wishes.clear()
        self._finish.clear()

    def _text(self, wish: Steer) -> str:
        request = self.job.request
        return text_of_shot(request.prompt if request.shots else "", wish.shot)

    def _steer(self, wish: Steer, block: int, schedule: Schedule, notice: str) -> None:
        request = steered(self.job.request, schedule.plan, block, wish.shot)
        self._check(request)
        plan = self._follow(request, schedule)
        assert request.shots is not None
        shot = request.shots[-1]
        event = Steered(
            job_id=wish.job_id, block=block, prompt=shot.prompt, transition=shot.transition,
            from_s=plan.frames(block).start / request.fps, num_blocks=plan.num_blocks,
            num_items=plan.num_blocks * schedule.num_steps, num_frames=plan.num_frames, notice=notice,
        )  # fmt: skip
        self._answer(SteerAnswer(wish.job_id, wish.number, steered=event, timeline=request))

    def _wrap_up(self, wish: Finish, block: int, schedule: Schedule) -> None:
        plan = self._follow(wrapped_up(self.job.request, schedule.plan, block), schedule)
        event = WrappedUp(
            job_id=wish.job_id, num_blocks=plan.num_blocks, num_items=plan.num_blocks * schedule.num_steps,
            num_frames=plan.num_frames,
        )  # fmt: skip
        self._answer(SteerAnswer(wish.job_id, wish.number, steered=event, timeline=self.job.request))

    def _follow(self, request: Settings, schedule: Schedule) -> BlockPlan:
        """Store `request` and make it the job's. Raises `RequestError`, OSError."""
        plan = plan_of(request)
        experts = [expert for _, expert in sorted({(item.step, item.expert) for item in schedule.items})]
        if make_schedule(rules_of(request), plan, experts).max_order != schedule.max_order:
            raise RequestError("the new timeline would skip steps, and what it needs for that has not been kept", "prompt")
        write_record(Path(self.job.folder) / STEERED, {"request": request.model_dump(exclude_none=True)})
        self.job = dataclasses.replace(self.job, request=request)
        return plan
