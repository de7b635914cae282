"""Ctrl-C at any moment of `submit` leaves no lock behind, so that the engine can be used, or closed, afterwards."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dualparal.engine.engine import Engine
from dualparal.locks import SafeCondition
from dualparal.request import GenerationRequest
from tests.fake_group import FOUR_BLOCKS, fake_groups

SECONDS = 20.0
FILES = ("threading.py", "dispatcher.py", "job.py", "job_queue.py", "locks.py", "replica.py", "engine.py")
LOOKED_AT = tuple(f"/{name}" for name in FILES)


def interrupted_at(moment: int, call: Callable[[], Any]) -> bool:
    """Run `call` and raise KeyboardInterrupt in it at the `moment`th call or return in the files above.

    False when it has fewer. Signals are looked for at calls, not at every line; in a generator that is being thrown away
    nobody would see the exception.
    """
    left = moment

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(LOOKED_AT) or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None
        left -= event in ("return", "call")
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def is_free(condition: SafeCondition) -> bool:
    """Whether another thread can have the lock."""
    found: list[bool] = []

    def take() -> None:
        found.append(condition.acquire(timeout=SECONDS))
        if found[0]:
            condition.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return found[0]


def test_a_condition_is_never_left_locked() -> None:
    condition, moment = SafeCondition(), 1

    def use() -> None:
        with condition, condition:
            condition.notify_all()

    while interrupted_at(moment, use):
        assert is_free(condition), moment
        moment += 1
    assert moment > 1
    use()


def test_threads_can_wait_for_it() -> None:
    condition, seen = SafeCondition(), []

    def wait() -> None:
        with condition:
            seen.append(condition.wait_for(lambda: bool(seen), SECONDS))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with condition:
        seen.append(True)
        condition.notify_all()
    waiting.join()
    assert seen == [True, True]


def test_control_c_anywhere_in_submit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerationRequest(prompt="slow", seed=1, **FOUR_BLOCKS)
    with fake_groups(monkeypatch) as group_log:
        engine = Engine(tiny, device="cpu", threads=1, outputs=tmp_path, max_queue=10_000).start()
        resolved, moment = engine.resolve(request), 1
        while interrupted_at(moment, lambda: engine.submit(resolved)):
            assert is_free(engine.dispatcher.changed), moment
            assert all(is_free(job._changed) for job in engine.jobs()), moment
            for job in engine.jobs():
                engine.dispatcher.queue.remove(job)
            moment += 1
        group_log.let_go.set()
        assert moment > 30
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(SECONDS)
        assert not closing.is_alive(), "the engine cannot be closed"
