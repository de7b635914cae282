"""The table of cards and models is what the planner says now: held by one of its rows, for the others take minutes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.model_cards import HEAD, planned, rows_of
from dualparal.presets import load_presets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_docs_have_a_row_as_the_planner_says_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"| {' | '.join(HEAD)} |\n" in page
    for row in rows_of(load_presets()["wan2.1-1.3b-480p"], (24, 48), (2,), 200e12):
        assert f"| {' | '.join(row)} |\n" in page, f"docs/models.md is behind: python -m benchmarks.model_cards\n{row}"


def test_what_does_not_fit_has_no_row() -> None:
    preset = load_presets()["wan2.2-a14b-720p"]
    assert planned(preset, 1, 2) is None
    found = planned(preset, 8, 80)
    assert found is not None and found[1].bytes_per_rank < 80e9
