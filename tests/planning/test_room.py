"""Schedule and context left open: what the plan of the devices makes of them, and that it is said why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualparal import Engine, GenerationRequest
from dualparal.cli.main import main
from dualparal.planning.job_plan import plan_job
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.room import settle
from dualparal.presets import Preset, load_presets
from dualparal.request import Settings

GB = 10**9
FAST = Speed(flops_per_s=4e14)
CACHED, RECOMPUTED = ("preview", "cached"), ("paper", "recomputed")


def found(
    name: str = "wan2.1-14b-480p", ranks: int = 4, gigabytes: float | None = 80, *, away: bool = False, asked: Any = None,
    **more: Any,
) -> Settings:  # fmt: skip
    preset = load_presets()[name]
    sizes = ModelSizes.published(preset.model)
    assert sizes is not None
    layers = sizes.config["num_layers"] // ranks
    have = None if gigabytes is None else int(gigabytes * GB)
    placement = Placement(layers=(layers,) * ranks, codec_rank=ranks - 1, bytes_per_device=have, is_cache_offloaded=away)
    request = GenerationRequest(prompt="x", seconds=60, **(asked or {}))
    settings = settle(request, preset, sizes, placement, **more)
    fits = plan_job(settings, sizes, placement, is_short=True).refusal is None
    assert fits or settings.context == "recomputed"
    return settings


def pair(settings: Settings) -> tuple[str, str]:
    return settings.schedule, settings.context


@pytest.mark.parametrize(
    ("name", "ranks", "gigabytes", "chosen"),
    [
        ("wan2.1-1.3b-480p", 1, 80, CACHED),
        ("wan2.1-1.3b-480p", 1, 24, RECOMPUTED),
        ("wan2.1-14b-480p", 4, 80, CACHED),
        ("wan2.1-14b-480p", 4, 48, RECOMPUTED),
        ("wan2.1-14b-480p", 4, None, RECOMPUTED),
    ],
)
def test_preview_cached_where_it_fits_else_paper_recomputed(
    name: str, ranks: int, gigabytes: float | None, chosen: tuple[str, str]
) -> None:
    settings = found(name, ranks, gigabytes)
    assert pair(settings) == chosen
    assert settings.chosen.startswith(f"{chosen[0]} with {chosen[1]} context: ")
    if chosen == CACHED:
        assert (settings.max_in_flight, settings.stagger) == (5, 10) and settings.refresh > 0
        assert "5 blocks in flight (" in settings.chosen and settings.chosen.endswith("on a rank) fit")
    else:
        assert ("not known" if gigabytes is None else "do not fit") in settings.chosen


def test_host_memory_takes_them_where_copies_are_hidden() -> None:
    assert found(gigabytes=48).chosen.endswith("do not fit; with --offload_cache they would")
    assert pair(found(gigabytes=48, away=True)) == CACHED, "how long copies take has not been measured"
    for link, chosen in ((5e10, CACHED), (1e9, RECOMPUTED)):
        settings = found(gigabytes=48, away=True, speed=Speed(flops_per_s=4e14, link_bytes_per_s=link))
        assert pair(settings) == chosen
    assert "times as long" in settings.chosen
    small = found(gigabytes=48, away=True, host_bytes=64 * GB)
    assert pair(small) == RECOMPUTED and "the host's 64.0 GB" in small.chosen
    assert pair(found(gigabytes=48, away=True, host_bytes=256 * GB)) == CACHED


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"schedule": "paper"}, RECOMPUTED),
        ({"context": "recomputed"}, RECOMPUTED),
        ({"context": "cached"}, CACHED),
        ({"schedule": "preview", "context": "recomputed"}, ("preview", "recomputed")),
    ],
)
def test_what_is_asked_for_has_no_reason(asked: dict[str, str], chosen: tuple[str, str]) -> None:
    settings = found(asked=asked)
    assert pair(settings) == chosen and settings.chosen == ""


def test_auto_is_asked_for_like_nothing() -> None:
    assert found(asked={"schedule": "auto", "context": "auto", "seed": 1}) == found(asked={"seed": 1})


def test_the_seed_is_drawn_once() -> None:
    assert len({found(gigabytes=48).seed for _ in range(4)}) > 1


def test_the_engine_stores_what_it_chose(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualparal.engine import setup

    engine = Engine(tiny, device="cpu", outputs=tmp_path, preset=Preset(height=32, width=32))
    assert pair(engine.resolve(GenerationRequest(prompt="x"))) == CACHED
    monkeypatch.setattr(setup, "bytes_per_device", lambda device: 10**6)
    tight = Engine(tiny, device="cpu", outputs=tmp_path, preset=Preset(height=32, width=32))
    settings = tight.resolve(GenerationRequest(prompt="x"))
    assert pair(settings) == RECOMPUTED and settings.chosen
    assert engine.resolve(settings) is settings, "resumed and queued jobs keep what was chosen"
    assert engine.resolve(settings.as_request()) == settings.model_copy(update={"chosen": ""})


@pytest.mark.parametrize(("memory", "order"), [("80", "preview with cached context"), ("24", "paper with recomputed context")])
def test_plan_says_it(memory: str, order: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--preset", "wan2.1-1.3b-480p", "--gpus", "1", "--gpu_memory", memory, "--seconds", "60"])
    assert f"\nauto: {order}: K and V of 5 blocks in flight (" in capsys.readouterr().out
