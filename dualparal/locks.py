"""A condition variable that Ctrl-C cannot leave locked.

Entering and leaving `threading.Condition` runs Python code, and KeyboardInterrupt may come between its lock being taken and
the `with` block beginning: the lock is then held for ever, and every other thread waits for it. Entering and leaving the lock
itself is one step that no signal divides (https://bugs.python.org/issue29988).
"""

from __future__ import annotations

import threading
from typing import Any


class SafeCondition(threading.Condition):
    """`threading.Condition` over an RLock, whose `with` block is the lock's own."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())

    @property
    def __enter__(self) -> Any:
        return self._lock.__enter__  # type: ignore[attr-defined]

    @property
    def __exit__(self) -> Any:  # noqa: PLE0302 - a property
        return self._lock.__exit__  # type: ignore[attr-defined]
