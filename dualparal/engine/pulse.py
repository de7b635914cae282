"""What the workers' heartbeats say: who has fallen silent, and who has been at one and the same step for too long.

Time is passed in and counted, not read off the heartbeats: where this process or the whole machine was stopped for a while,
everybody's silence means nothing. Knows no process.
"""

from __future__ import annotations

from collections.abc import Collection

from dualparal.messages import Beat
from dualparal.network import LOST_AFTER_S

SILENCE_S = 20.0  # a worker that sends no heartbeat for so long hangs
LOADING_SILENCE_S = 300.0  # workers that load and in so long have read nothing hang (a disk, a network folder)
MIN_TOUCHED_BYTES = 2**16  # between two heartbeats; the heartbeat itself reads some
MAX_LOOK_S = 2.0  # between two looks; whatever is beyond it, this process has slept


class Pulse:
    """The heartbeats of one group of workers. `beats` holds each one's last."""

    def __init__(self, now_s: float, timeout_s: float, far: Collection[str] = ()) -> None:
        """`timeout_s`: how long one step may take. `far`: workers on other hosts; a lost connection is to be named as that, so
        their silence is given the time that takes besides."""
        self.beats: dict[str, Beat] = {}
        self._looked_s, self._timeout_s = now_s, timeout_s
        self._silence_s: dict[str, float] = {}
        self._still_s = 0.0  # since any worker has read something
        self._far = frozenset(far)

    def look(self, now_s: float) -> None:
        """Let time pass. Call it every second or so, before what has come since is taken."""
        passed_s, self._looked_s = min(now_s - self._looked_s, MAX_LOOK_S), now_s
        self._silence_s = {name: silence_s + passed_s for name, silence_s in self._silence_s.items()}
        self._still_s += passed_s

    def wait_on(self) -> None:
        """Some workers are not there yet: nobody can be expected to get on."""
        self._still_s = 0.0

    def hear(self, name: str) -> None:
        """A worker lives, and may be expected to go on sending heartbeats."""
        self._silence_s[name] = 0.0

    def take(self, beat: Beat) -> None:
        """A heartbeat has come."""
        self.hear(beat.name)
        before = self.beats.get(beat.name)
        if before is None or beat.touched_bytes is None or _touched(before, beat) >= MIN_TOUCHED_BYTES:
            self._still_s = 0.0
        self.beats[beat.name] = beat

    def fault(self, loading: Collection[str]) -> str | None:
        """One sentence on the first worker that hangs, None while all is well.

        Those `loading` may be silent, as importing may hold the interpreter for long, but one of them has to get on: they wait
        for each other.
        """
        if loading and self._still_s > LOADING_SILENCE_S:
            return f"{min(loading)} is loading and has read nothing for {LOADING_SILENCE_S:.0f} s"
        silent = [
            name for name, silence_s in self._silence_s.items() if silence_s > self._limit_s(name) and name not in loading
        ]
        if silent:  # on a loaded machine others may be late too; the one that hangs was heard least recently
            name = max(silent, key=self._silence_s.__getitem__)
            return f"{name} has not answered for {self._limit_s(name):.0f} s"
        for name, beat in self.beats.items():
            if beat.busy_s > self._timeout_s and name not in loading:
                return f"{name} has been at one step for {self._timeout_s:.0f} s ({beat.step}), the engine's timeout_s"
        return None

    def _limit_s(self, name: str) -> float:
        return SILENCE_S + LOST_AFTER_S * (name in self._far)


def _touched(before: Beat, now: Beat) -> int:
    return (now.touched_bytes or 0) - (before.touched_bytes or 0)
