"""`dualparal bench` finds its bench, and says how it is used."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from dualparal.bench.main import quality
from dualparal.cli.main import main


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


def test_records_from_before_a_method_could_cache_steps_still_count() -> None:
    methods = quality.all_methods()
    video = {"prompt": "a red circle", "seed": 0, "latents": 81, "steps": 20}
    keys = {name: quality._key({"method": asdict(method), **video}) for name, method in methods.items()}
    assert len(set(keys.values())) == len(methods)
    old = asdict(methods["paper 8+4, recomputed"])
    del old["cache_interval"]
    assert quality._key({"method": old, **video}) == keys["paper 8+4, recomputed"]
