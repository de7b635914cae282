"""A film stalls where a block comes later than its first frame is due."""

from __future__ import annotations

import pytest

from benchmarks.first_frames import stalled_s


@pytest.mark.parametrize(
    ("ready", "stalled"), [([1.0, 2.0, 3.0], 0.0), ([1.0, 4.0, 5.0], 1.0), ([1.0, 4.0, 9.0], 4.0), ([7.0, 7.0, 7.0], 0.0)]
)
def test_stalls_are_what_a_viewer_waits_after_the_first_frame(ready: list[float], stalled: float) -> None:
    assert stalled_s(list(zip(ready, [0.0, 2.0, 4.0], strict=True))) == stalled
