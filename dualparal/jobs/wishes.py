"""What a running job has been asked for on the way (another prompt, its end), until rank 0 has answered. Knows no process."""

from __future__ import annotations

import itertools

from dualparal.errors import RequestError
from dualparal.events import Steered, WrappedUp
from dualparal.locks import SafeCondition
from dualparal.messages import SteerAnswer


class Wishes:
    """The wishes of one job; `changed` is the job's lock."""

    def __init__(self, changed: SafeCondition) -> None:
        self._changed = changed
        self._numbers = itertools.count(1)
        self._answers: dict[int, Steered | WrappedUp | str | None] = {}  # None: not yet

    def open(self) -> int:
        """The number of a new wish."""
        with self._changed:
            number = next(self._numbers)
            self._answers[number] = None
            return number

    def answer(self, message: SteerAnswer) -> None:
        with self._changed:
            if message.number in self._answers:
                self._answers[message.number] = message.steered or message.refusal
                self._changed.notify_all()

    def refuse_all(self, reason: str) -> None:
        """Nobody is left who could answer."""
        with self._changed:
            self._answers |= {number: reason for number, answer in self._answers.items() if answer is None}
            self._changed.notify_all()

    def wait(self, number: int, timeout_s: float | None) -> Steered | WrappedUp:
        """The answer to wish `number`. Raises `RequestError` with the reason where it is refused, TimeoutError."""
        with self._changed:
            try:
                if not self._changed.wait_for(lambda: self._answers[number] is not None, timeout_s):
                    raise TimeoutError(f"the wish was not granted within {timeout_s} s; it may still be")
                answer = self._answers[number]
            finally:
                del self._answers[number]
        if isinstance(answer, str):
            raise RequestError(answer, "prompt")
        assert answer is not None
        return answer
