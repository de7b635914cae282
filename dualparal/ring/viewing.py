"""Who watches an endless film while it is made: how far it may be ahead of them (METHOD.md, "Prompts over time").

What is ahead was asked for before: a film that is not made far ahead is quick to steer, and a server does not work for nobody.
Waiting changes no bit, as it happens between two block steps. Runs on rank 0; knows no stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from dualparal.method.schedule import Item
from dualparal.request import Settings

WATCHED_S = 15.0  # after the last word of whoever watches; a page tells every two seconds
POLL_S = 0.05
IN_PLACE_S = 10.0  # who plays on is waited for with the other ranks ready; after that they leave the job until it goes on


class Viewing:
    """What of one film is made and what is played, in seconds of the film."""

    def __init__(self, request: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._request, self._clock = request, clock
        self._made_s = self._played_s = 0.0
        self._told_s: float | None = None
        self.held_s = 0.0  # how long it has waited

    def tell(self, played_s: float) -> None:
        """Somebody watches and has seen so much. Of several the one who is furthest counts."""
        now_s = self._clock()
        is_behind = self._is_watched(now_s) and played_s < self._played_s
        if not is_behind:
            self._played_s, self._told_s = min(played_s, self._made_s), now_s

    def made(self, num_frames: int) -> None:
        """So many frames are denoised."""
        self._made_s = num_frames / self._request.fps

    def holds(self, item: Item) -> bool:
        """Whether `item`, with which a block enters, has to wait."""
        return self._request.is_endless and item.step == 0 and self._is_ahead()

    def wait(
        self, is_called: Callable[[], bool], most_s: float = math.inf, sleep: Callable[[float], None] = time.sleep
    ) -> bool:
        """Until the film is no longer too far ahead, nobody watches, `most_s` have passed, or `is_called`, which is asked all
        the time; whether it was."""
        began_s = self._clock()
        while not (was_called := is_called()) and self._is_ahead() and self._clock() - began_s < most_s:
            sleep(POLL_S)
        self.held_s += self._clock() - began_s
        return was_called

    def _is_ahead(self) -> bool:
        return self._is_watched(self._clock()) and self._made_s - self._played_s > self._request.lead

    def _is_watched(self, now_s: float) -> bool:
        return self._told_s is not None and now_s - self._told_s <= WATCHED_S
