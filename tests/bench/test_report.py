"""From records to numbers: intervals, and differences of methods over the same prompts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dualparal.bench.report import AGAINST, difference, interval, table_of_differences


def record(method: str, number: int, **values: Any) -> dict[str, Any]:
    plain = {"num_frames": 9, "seconds": 1.0, "start_px": [0.0, 0.0], "jump_size": [None, 1.0], "jump_color": [2.0, 1.0]}
    marks = dict.fromkeys(("color", "shape", "background", "motion", "all", "all_last_quarter", "repetition"), 0.5)
    errors = {"palette_first": 0.01, "palette_last": 0.01, "jump_position": [2.0, 1.0], "jump_velocity": [2.0, 1.0]}
    return {"method": {"name": method}, "prompt": f"prompt {number}", "seed": 0, **plain, **marks, **errors, **values}


def some(method: str, field: str, values: list[Any]) -> list[dict[str, Any]]:
    return [record(method, number, **{field: value}) for number, value in enumerate(values)]


def test_the_difference_is_surer_than_the_two_means() -> None:
    """Prompts that differ much, methods that differ little and alike on every prompt."""
    rng = random.Random(0)
    easy = [rng.random() for _ in range(12)]
    one, other = some("one", "motion", easy), some("other", "motion", [value - 0.01 for value in easy])
    found = difference(one, other, "motion")
    assert found == pytest.approx((0.01, 0.01, 0.01))
    mean, low, high = interval(one, "motion") or (0, 0, 0)
    assert low < mean - 0.01 < high, "the two intervals overlap"


def test_the_difference_of_seams_is_one_of_pooled_ratios() -> None:
    jumps = [[3.0, 1.0], [1.0, 3.0], [2.0, 0.5]]
    one, other = some("one", "jump_position", jumps), some("other", "jump_position", [[1.0, 1.0]] * 3)
    found = difference(one, other, "jump_position")
    assert found is not None
    assert found[0] == pytest.approx(6 / 4.5 - 1, abs=1e-6)
    rng = random.Random(1)
    draws = []
    for _ in range(4000):
        drawn = [jumps[rng.randrange(3)] for _ in range(3)]
        draws.append(sum(border for border, _ in drawn) / sum(inside for _, inside in drawn) - 1)
    draws.sort()
    assert found[1] == pytest.approx(draws[100], abs=0.1) and found[2] == pytest.approx(draws[3900], abs=0.3)


def test_only_what_both_have_is_compared() -> None:
    one = some("one", "motion", [0.2, 0.4, 0.9])
    other = some("other", "motion", [0.1, 0.3])
    assert difference(one, other, "motion") == pytest.approx((0.1, 0.1, 0.1))
    assert difference(one, [], "motion") is None
    assert difference(one, other, "jump_size") is None, "no seams were seen"
    partly = [record("one", 0, jump_size=[4.0, 1.0]), record("one", 1), record("one", 2, jump_size=[1.0, 1.0])]
    full = [record("other", number, jump_size=[1.0, 1.0]) for number in range(3)]
    found = difference(partly, full, "jump_size")
    assert found is not None and found[0] == pytest.approx(2.5 - 1)


def test_a_row_for_every_other_method_and_bold_where_it_is_sure() -> None:
    better = [record("better", n, motion=0.9) for n in range(4)]
    same = [record("same", n, motion=0.5 + 0.01 * (-1) ** n) for n in range(4)]
    text = table_of_differences([record(AGAINST, n) for n in range(4)] + better + same, AGAINST)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()[2:]}
    assert list(rows) == ["better", "same"]
    assert "| 4 | **+0.40 (+0.40 to +0.40)** |" in rows["better"]
    assert "**" not in rows["same"] and "| 4 | +0.00 (" in rows["same"]
    assert table_of_differences(better, AGAINST) == ""
