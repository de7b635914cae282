"""`dualparal bench` finds its bench, and says how it is used."""

from __future__ import annotations

import pytest

from dualparal.cli import main


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["nonsense"], 2)])
def test_bench_says_how_it_is_used(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == code
    seen = capsys.readouterr()
    assert "bench quality" in seen.out + seen.err


def test_bench_quality_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "quality", "--help"])
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out
