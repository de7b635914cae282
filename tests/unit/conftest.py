"""Engines without processes, for tests of what happens around the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualparal.runtime.engine import Engine
from tests.fake_group import Notebook, fake_groups

Make = Callable[..., Engine]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    with fake_groups(monkeypatch) as found:
        yield found


@pytest.fixture
def make(tiny: Path, tmp_path: Path, notes: Notebook) -> Iterator[Make]:
    made: list[Engine] = []

    def engine(model: Path = tiny, **options: Any) -> Engine:
        made.append(Engine(model, outputs=tmp_path / "outputs", **{"device": "cpu", "threads": 1, **options}))
        return made[-1]

    yield engine
    notes.let_go.set()
    for one in made:
        one.close()
