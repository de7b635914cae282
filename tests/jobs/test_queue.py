"""The queue's policy: fair between owners, first come first served within, nobody starves, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.errors import QueueFull
from dualparal.jobs.queue import MAX_REMEMBERED, JobQueue

OWNERS = "abcd"
# (owner, number): equal to no other
Arrivals = st.lists(st.sampled_from(OWNERS), max_size=30)
Actions = st.lists(st.one_of(st.sampled_from(OWNERS), st.just("pop"), st.just("remove"), st.just("again")), max_size=80)


def filled(owners: str) -> JobQueue[str]:
    waiting: JobQueue[str] = JobQueue()
    for number, owner in enumerate(owners):
        waiting.push(f"{owner}{number}", owner)
    return waiting


def drained(waiting: JobQueue[str]) -> list[str]:
    return [waiting.pop() or "" for _ in range(len(waiting))]


def test_owners_take_turns_and_each_line_keeps_its_order() -> None:
    assert drained(filled("aaabbc")) == ["a0", "b3", "c5", "a1", "b4", "a2"]
    assert drained(filled("")) == []


def test_one_who_comes_after_another_has_been_served_is_next() -> None:
    waiting = filled("aaaa")
    assert waiting.pop() == "a0"
    waiting.push("b4", "b")
    assert drained(waiting) == ["b4", "a1", "a2", "a3"]


def test_being_away_saves_up_nothing() -> None:
    waiting = filled("aaaaa")
    for _ in range(3):
        waiting.pop()
    for number in range(5, 8):
        waiting.push(f"b{number}", "b")
    assert drained(waiting) == ["b5", "a3", "b6", "a4", "b7"]


def test_submitting_one_by_one_is_not_an_advantage() -> None:
    waiting = filled("bbbbb")
    served = []
    for number in range(10, 16):
        waiting.push(f"a{number}", "a")
        served.append(waiting.pop() or "")
    assert [name[0] for name in served] == ["b", "a", "b", "a", "b", "a"]


def test_invented_owners_cannot_starve_a_line() -> None:
    waiting: JobQueue[str] = JobQueue(max_overtakes=5)
    for number in range(3):
        waiting.push(f"victim{number}", "victim")
    served = []
    for number in range(40):
        waiting.push(f"new{number}", f"new{number}")
        served.append(waiting.pop())
    assert [served.index(f"victim{number}") for number in range(3)] == sorted(
        served.index(f"victim{number}") for number in range(3)
    )


def test_an_interrupted_job_goes_first() -> None:
    waiting = filled("ab")
    waiting.push_first("x")
    waiting.push_first("y")
    assert list(waiting) == ["x", "y", "a0", "b1"]
    assert waiting.remove("y")
    assert drained(waiting) == ["x", "a0", "b1"]


def test_a_job_that_is_not_free_holds_up_its_owner_only() -> None:
    waiting = filled("aab")
    assert waiting.pop(lambda job: job != "a0") == "b2"
    assert waiting.pop(lambda job: job != "a0") is None
    assert drained(waiting) == ["a0", "a1"]


def test_limits_are_refusals_with_the_number() -> None:
    waiting: JobQueue[int] = JobQueue(max_jobs=3, max_per_owner=2)
    waiting.check_room("a", num_running=1)
    waiting.push(1, "a")
    with pytest.raises(QueueFull, match="you have 2 jobs"):
        waiting.check_room("a", num_running=1)
    waiting.check_room("a")
    waiting.push(2, "a")
    waiting.check_room("b")
    waiting.push(3, "b")
    with pytest.raises(QueueFull, match="3 jobs are waiting"):
        waiting.check_room("c")
    waiting.push(4, "c")  # a job accepted by an earlier run is taken back all the same
    assert len(waiting) == 4
    waiting.clear()
    waiting.check_room("a")


@given(Actions)
def test_whatever_happens_nothing_is_lost_or_doubled(actions: list[str]) -> None:
    waiting: JobQueue[tuple[str, int]] = JobQueue()
    inside: set[tuple[str, int]] = set()
    popped: list[tuple[str, int]] = []
    for number, action in enumerate(actions):
        expected = list(waiting)
        assert set(expected) == inside and len(expected) == len(waiting) == len(inside)
        if action == "pop":
            found = waiting.pop()
            assert found == (expected[0] if expected else None), "iteration tells the order"
            if found:
                inside.remove(found)
                popped.append(found)
        elif action == "remove":
            if inside:
                gone = sorted(inside)[number % len(inside)]
                assert gone in waiting and waiting.remove(gone) and gone not in waiting
                inside.remove(gone)
            assert not waiting.remove(("nobody", 0))
        elif action == "again":
            if popped:
                waiting.push_first(popped[-1])
                inside.add(popped.pop())
        else:
            waiting.push((action, number), action)
            inside.add((action, number))
    assert len(waiting._next_turn) <= len(OWNERS)


def test_owners_are_forgotten() -> None:
    waiting: JobQueue[int] = JobQueue()
    for number in range(500):
        waiting.push(number, f"owner {number}")
        assert waiting.pop() == number
    assert len(waiting._next_turn) <= 256


@given(Arrivals)
def test_each_owner_is_served_in_the_order_of_arrival(arrivals: list[str]) -> None:
    order = drained(filled("".join(arrivals)))
    for owner in OWNERS:
        mine = [int(name[1:]) for name in order if name[0] == owner]
        assert mine == sorted(mine)


@given(Arrivals)
def test_while_two_owners_wait_neither_gets_two_more_than_the_other(arrivals: list[str]) -> None:
    order = [name[0] for name in drained(filled("".join(arrivals)))]
    for one in OWNERS:
        for other in OWNERS:
            until = min(_last(order, one), _last(order, other))
            seen = order[: until + 1]
            assert abs(seen.count(one) - seen.count(other)) <= 1 or until < 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_no_job_is_overtaken_without_end(owners: list[int], limit: int) -> None:
    waiting: JobQueue[int] = JobQueue(max_overtakes=limit)
    waiting.push(-1, "victim")
    num_served = 0
    for number, owner in enumerate(owners * 3):
        waiting.push(number, f"invented {number} {owner}")
        waiting.push(number + 1000, "busy")
        if waiting.pop() == -1:
            break
        num_served += 1
    assert num_served <= limit


def _last(order: list[str], owner: str) -> int:
    return len(order) - 1 - order[::-1].index(owner) if owner in order else -1


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 400), st.just("pop"), st.just("back"), st.just("hurt")), max_size=120), st.integers(0, 9)
)
def test_the_order_told_is_the_order_kept(actions: list[int | str], max_overtakes: int) -> None:
    """Many owners, more than are remembered, and jobs that go first because they were overtaken."""
    waiting: JobQueue[int] = JobQueue(max_overtakes=max_overtakes)
    for owner in range(MAX_REMEMBERED + 9):
        waiting.push(-1 - owner, owner)
    for number, action in enumerate(actions):
        if isinstance(action, int):
            for copy in range(3):
                waiting.push(3 * number + copy, action)
        elif (job := waiting.pop()) is not None and action == "back":
            waiting.put_back(job)
        elif job is not None and action == "hurt":
            waiting.push_first(job)
    reported = list(waiting)
    assert reported == [waiting.pop() for _ in range(len(waiting))]
