"""The scaling charts: every run is in them, and the file is well-formed SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.scaling_plots import Run, charts_of, draw, straightness

RUNS = [Run(ranks, latents, 2, "recomputed", latents / ranks) for ranks in (1, 2, 4) for latents in (12, 24, 48)]
RUNS += [
    Run(4, 48, cat, context, 12.0 + cat * (context == "recomputed")) for context in ("recomputed", "cached") for cat in (0, 4)
]


def test_every_run_is_drawn() -> None:
    latents, ranks, cat = charts_of(RUNS, usual_cat=2)
    assert [line.name for line in latents.lines] == ["1 ranks", "2 ranks", "4 ranks"]
    assert latents.lines[1].points == [(12, 6.0), (24, 12.0), (48, 24.0)]
    measured, ideal = ranks.lines
    assert measured.points == ideal.points == [(1, 48.0), (2, 24.0), (4, 12.0)] and ideal.is_ideal
    assert [line.points for line in cat.lines] == [[(0, 12.0), (2, 12.0), (4, 16.0)], [(0, 12.0), (4, 12.0)]]
    root = ET.fromstring(draw([latents, ranks, cat]))
    names = [element.tag.partition("}")[2] for element in root.iter()]
    assert names.count("polyline") == 3 + 2 + 2
    assert names.count("circle") == 9 + 3 + 5


def test_how_straight_a_line_is() -> None:
    assert straightness([(1, 2.0), (2, 4.0), (3, 6.0)]) == pytest.approx(0.0)
    assert straightness([(0, 0.0), (1, 3.0), (2, 0.0)]) == pytest.approx(2 / 3)
