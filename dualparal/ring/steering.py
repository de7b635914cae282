"""Steering: a job under way takes up another timeline (METHOD.md, "Prompts over time").

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
from dualparal.events import Steered
from dualparal.files import STEERED, write_record
from dualparal.messages import TOO_LATE, RunJob, Steer, SteerAnswer
from dualparal.method.rules import plan_of, rules_of
from dualparal.method.schedule import Item, Schedule, make_schedule
from dualparal.method.timeline import steered
from dualparal.prompts import text_of_shot
from dualparal.request import Settings
from dualparal.ring.encoding import Encoding

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
        self._is_encoding = False  # the first of them

    def ask(self, wish: Steer) -> None:
        """Take a wish; it is answered when it is followed or refused."""
        if any(given is not None for given in (self.job.latents, self.job.prompt_embeds, self.job.negative_prompt_embeds)):
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=HAS_TENSORS))
            return
        self._wishes.append(wish)

    def is_due(self, item: Item, schedule: Schedule) -> bool:
        """Whether `job` has a new timeline, to be followed from `item` of `schedule` on."""
        if not self._wishes:
            return False
        wish = self._wishes[0]
        block = 1 + max((before.block for before in schedule.items[: item.index]), default=-1)
        if block == schedule.plan.num_blocks:
            self.refuse_all()
            return False
        if not self._is_encoding:  # not when it came: rank 0 may have been waiting for other things of the codec's
            self._encoding.ask(wish.job_id, self._text(wish))
            self._is_encoding = True
        is_there, notice = self._encoding.has(wish.job_id, self._text(wish))
        if not is_there:
            return False
        self._wishes.popleft()
        self._is_encoding = False
        try:
            self._follow(wish, block, schedule, notice)
        except (RequestError, OSError) as error:
            why = str(error) if isinstance(error, RequestError) else f"the new timeline cannot be stored: {error.strerror}"
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=why))
            return False
        return True

    def refuse_all(self) -> None:
        """Nothing that has not entered is left."""
        while self._wishes:
            wish = self._wishes.popleft()
            self._answer(SteerAnswer(wish.job_id, wish.number, refusal=TOO_LATE))

    def _text(self, wish: Steer) -> str:
        request = self.job.request
        return text_of_shot(request.prompt if request.shots else "", wish.shot)

    def _follow(self, wish: Steer, block: int, schedule: Schedule, notice: str) -> None:
        request = steered(self.job.request, schedule.plan, block, wish.shot)
        self._check(request)
        assert request.shots is not None
        plan, shot = plan_of(request), request.shots[-1]
        experts = [expert for _, expert in sorted({(item.step, item.expert) for item in schedule.items})]
        if make_schedule(rules_of(request), plan, experts).max_order != schedule.max_order:
            raise RequestError("the new timeline would skip steps, and what it needs for that has not been kept", "prompt")
        write_record(Path(self.job.folder) / STEERED, {"request": request.model_dump(exclude_none=True)})
        self.job = dataclasses.replace(self.job, request=request)
        event = Steered(
            job_id=wish.job_id, block=block, prompt=shot.prompt, transition=shot.transition,
            from_s=plan.frames(block).start / request.fps, num_blocks=plan.num_blocks,
            num_items=plan.num_blocks * schedule.num_steps, num_frames=plan.num_frames, notice=notice,
        )  # fmt: skip
        self._answer(SteerAnswer(wish.job_id, wish.number, steered=event, timeline=request))
