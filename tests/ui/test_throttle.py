"""Words to those who follow a job get rarer the more there are, and are as frequent as before when they have gone."""

from __future__ import annotations

import pytest

from dualparal.ui import throttle


def test_the_more_the_rarer() -> None:
    with throttle.follower() as pause_s:
        alone_s = pause_s()
        with throttle.follower(), throttle.follower():
            assert pause_s() == pytest.approx(3 * alone_s)
        with pytest.raises(ZeroDivisionError), throttle.follower():
            raise ZeroDivisionError
        assert pause_s() == alone_s < 0.9, "a tab alone is told once a second"
