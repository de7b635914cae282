"""How often those who follow a job are told where it stands: once a second, and less often the more there are.

Every word to a tab costs Gradio some five milliseconds of the loop that also opens pages. What is ready is told at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

SECONDS_EACH = 0.02  # of the time between two words to one: all together take a quarter of a core
_num_following = 0


@contextlib.contextmanager
def follower() -> Iterator[Callable[[], float]]:
    """Somebody follows a job; inside, the seconds between two words to them, as many as there are now. Of one event loop."""
    global _num_following
    _num_following += 1
    try:
        yield lambda: _num_following * SECONDS_EACH
    finally:
        _num_following -= 1
