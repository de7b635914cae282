"""An endless film and who watches it: when a block has to wait."""

from __future__ import annotations

import pytest

from dualparal.method.schedule import Item
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest, Settings
from dualparal.ring.viewing import WATCHED_S, Viewing

ENTERS, GOES_ON = Item(40, 8, 3, 0, 0), Item(41, 8, 2, 4, 0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def film(**values: object) -> Settings:
    return complete(GenerationRequest(prompt="a cat", fps=16, **values), Preset(num_per_block=4, num_cat=2))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def viewing(clock: Clock) -> Viewing:
    return Viewing(film(is_endless=True, lead=3), clock)


def test_no_block_enters_while_more_than_the_lead_is_unplayed(viewing: Viewing) -> None:
    viewing.tell(0)
    viewing.made(48)
    assert not viewing.holds(ENTERS), "three seconds are not more than three"
    viewing.made(49)
    assert viewing.holds(ENTERS) and not viewing.holds(GOES_ON), "what is in flight goes on"
    viewing.tell(0.1)
    assert not viewing.holds(ENTERS)


def test_a_film_that_nobody_watches_goes_on(viewing: Viewing, clock: Clock) -> None:
    viewing.made(1000)
    assert not viewing.holds(ENTERS), "nobody ever did"
    viewing.tell(1)
    assert viewing.holds(ENTERS)
    clock.now_s += WATCHED_S + 1
    assert not viewing.holds(ENTERS), "the page was closed"
    viewing.tell(2)
    assert viewing.holds(ENTERS), "somebody came back"


def test_of_several_who_watch_the_one_who_is_furthest_counts(viewing: Viewing, clock: Clock) -> None:
    viewing.made(160)
    viewing.tell(8)
    viewing.tell(1)
    assert not viewing.holds(ENTERS)
    clock.now_s += WATCHED_S + 1
    viewing.tell(1)
    assert viewing.holds(ENTERS), "the other one has left"


def test_nobody_has_seen_what_is_not_made(viewing: Viewing) -> None:
    viewing.made(16)
    viewing.tell(500)  # another film's, which the page has shown before
    viewing.made(16 + 49)
    assert viewing.holds(ENTERS)


def test_a_film_with_an_end_never_waits(clock: Clock) -> None:
    viewing = Viewing(film(seconds=20, lead=0), clock)
    viewing.tell(0)
    viewing.made(160)
    assert not viewing.holds(ENTERS)


def test_waiting_ends_by_itself_or_when_called(viewing: Viewing, clock: Clock) -> None:
    viewing.tell(0)
    viewing.made(160)
    assert not viewing.wait(lambda: False, sleep=clock.sleep)
    assert WATCHED_S < viewing.held_s < WATCHED_S + 1
    viewing.tell(0)
    calls = iter([False, False, True])
    before_s = viewing.held_s
    assert viewing.wait(lambda: next(calls), sleep=clock.sleep)
    assert viewing.held_s - before_s < 1
    assert not viewing.wait(lambda: False, 2, clock.sleep) and viewing.holds(ENTERS), "it has waited long enough"
