"""The split whose slowest stage is fastest: against every split there is, in plans, in the engine and over several hosts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal import Engine, GenerationRequest, Settings
from dualparal.cli.flags import make_engine
from dualparal.cli.main import main, make_parser
from dualparal.errors import RequestError
from dualparal.hosts.host import RankHost
from dualparal.hosts.torchrun import Team
from dualparal.model import calibrate
from dualparal.planning.calibration import load_speed, store_speed
from dualparal.planning.job_plan import fastest_layers, plan_job
from dualparal.planning.layer_split import StepTimes, fastest_split, split_layers
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.sizes import DiTSizes
from dualparal.presets import complete, load_presets
from dualparal.ui import serve

TIMES = st.floats(0.0, 50.0)


def every_split(num_layers: int, ranks: int) -> list[tuple[int, ...]]:
    """All ways to cut `num_layers` into `ranks` runs of at least one."""
    cuts = itertools.combinations(range(1, num_layers), ranks - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in cuts]


@settings(deadline=None)
@given(st.data())
def test_no_split_is_faster(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 5))
    num_layers = data.draw(st.integers(ranks, 13))
    codec_rank = data.draw(st.none() | st.integers(0, ranks - 1))
    times = StepTimes(
        layer=data.draw(st.floats(0.01, 10.0)), first=data.draw(TIMES), last=data.draw(TIMES), decode=data.draw(TIMES)
    )
    found = fastest_split(num_layers, ranks, times, codec_rank)
    assert len(found) == ranks and sum(found) == num_layers and min(found) >= 1
    best = min(max(times.of_ranks(split, codec_rank)) for split in every_split(num_layers, ranks))
    assert max(times.of_ranks(found, codec_rank)) == pytest.approx(best, rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 40), st.floats(1e-6, 1e6))
def test_without_anything_besides_it_is_the_even_split(ranks: int, more: int, layer: float) -> None:
    even = tuple(len(stage) for stage in split_layers(ranks + more, ranks))
    assert fastest_split(ranks + more, ranks, StepTimes(layer=layer)) == even


def test_who_has_more_to_do_besides_gets_fewer_layers() -> None:
    assert fastest_split(30, 4, StepTimes(layer=1.0, first=1.0, last=1.0)) == (7, 8, 8, 7)
    assert fastest_split(40, 4, StepTimes(layer=1.0, decode=4.0), codec_rank=3) == (11, 11, 11, 7)
    assert fastest_split(4, 2, StepTimes(layer=1.0, first=100.0)) == (1, 3), "each rank keeps a layer"
    with pytest.raises(ValueError, match="2 layers do not split"):
        fastest_split(2, 3, StepTimes(layer=1.0))


# Plans


def case(ranks: int = 4, name: str = "wan2.1-1.3b-480p", **values: Any) -> tuple[Settings, ModelSizes, Placement]:
    preset = load_presets()[name]
    model = ModelSizes.published(preset.model)
    assert model is not None
    layers = tuple(len(stage) for stage in split_layers(model.config["num_layers"], ranks))
    request = complete(GenerationRequest(prompt="x", **values), preset, ranks=ranks)
    return request, model, Placement(layers=layers, codec_rank=ranks - 1)


MEASURED = Speed(flops_per_s=2e14, decode_s_per_pixel=1e-6, embed_s_per_token=2e-8, head_s_per_token=1e-7, sampler_s=0.002)


@pytest.mark.parametrize(
    "values", [{}, {"schedule": "preview"}, {"schedule": "preview", "context": "cached", "micro_batches": True}]
)
@pytest.mark.parametrize("speed", [None, Speed(flops_per_s=2e14), MEASURED, dataclasses.replace(MEASURED, sampler_s=0.4)])
def test_the_plan_of_the_fastest_split_is_the_fastest(values: dict[str, Any], speed: Speed | None) -> None:
    """The whole job, item by item, with each rank's layers exchanged one for one: none makes the slowest rank faster."""
    request, model, placement = case(seconds=8, **values)
    layers = fastest_layers(request, model, placement, speed)
    assert sum(layers) == 30

    def slowest(split: tuple[int, ...]) -> float:
        plan = plan_job(request, model, dataclasses.replace(placement, layers=split), speed=speed)
        return max(sum(plan.cost(item, rank) for item in plan.workload.schedule.items) for rank in range(len(split)))

    best = slowest(layers)
    for giver, taker in itertools.permutations(range(4), 2):
        if layers[giver] == 1:
            continue
        moved = list(layers)
        moved[giver] -= 1
        moved[taker] += 1
        assert slowest(tuple(moved)) >= best * (1 - 1e-9)


def test_what_is_measured_counts() -> None:
    request, model, placement = case()
    assert fastest_layers(request, model, placement) == (7, 8, 8, 7), "by FLOPs the ends weigh little, but more than nothing"
    slow_sampler = dataclasses.replace(MEASURED, sampler_s=0.4)
    assert fastest_layers(request, model, placement, slow_sampler)[0] < 7
    decoding = dataclasses.replace(MEASURED, decode_s_per_pixel=1e-5)
    assert fastest_layers(request, model, placement, decoding)[3] < 7
    alone = dataclasses.replace(placement, codec_rank=None)
    assert fastest_layers(request, model, alone, decoding)[3] == 7, "a codec with a GPU of its own is in nobody's way"


def test_times_hold_all_that_a_rank_does() -> None:
    request, model, placement = case()
    plain, full = (plan_job(request, model, placement, speed=speed) for speed in (Speed(flops_per_s=2e14), MEASURED))
    items = full.workload.schedule.items
    more = [sum(full.cost(item, rank) - plain.cost(item, rank) for item in items) for rank in range(4)]
    tokens = sum(full.workload.window_tokens(item) for item in items)
    own = sum(full.workload.own_tokens(item) for item in items)
    embed_flops, head_flops = (
        sum(count(item) for item in items) for count in (full.workload.embed_flops, full.workload.head_flops)
    )
    assert more[0] == pytest.approx(2e-8 * tokens + 0.002 * len(items) - embed_flops / 2e14)
    assert more[1] == more[2] == 0
    decoded = 1e-6 * 480 * 832 * request.latents_num
    assert more[3] == pytest.approx(1e-7 * 2 * own - head_flops / 2e14 + decoded)


def test_a_split_that_does_not_fit_is_not_chosen() -> None:
    request, model, placement = case(2, "wan2.1-14b-480p")
    slow_decoder = dataclasses.replace(MEASURED, decode_s_per_pixel=1e-2)
    free = fastest_layers(request, model, placement, slow_decoder)
    assert free == (39, 1)
    need = plan_job(request, model, dataclasses.replace(placement, layers=free)).memory.ranks[0].total
    tight = dataclasses.replace(placement, bytes_per_device=need - 1)
    layers = fastest_layers(request, model, tight, slow_decoder)
    assert layers != free
    assert plan_job(request, model, dataclasses.replace(tight, layers=layers)).refusal is None


# What is measured


def test_the_ends_are_measured_as_a_stage_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = DiTSizes.of({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48})
    seen: list[Any] = []

    def once(run: Any, device: torch.device, repeats: int = 3) -> float:
        seen.append(run())
        return 6.0

    monkeypatch.setattr(calibrate, "_median_s", once)
    with torch.inference_mode():
        embed_s, head_s = calibrate._ends_s(sizes, torch.device("cpu"), torch.bfloat16, 32)
        assert calibrate._sampler_s(sizes, torch.device("cpu"), 32) == 6.0
    tokens, patches, stepped = seen
    assert tokens.shape == (2, 32, 24) and tokens.dtype == torch.bfloat16
    assert patches.shape == (2, 32, 4 * 16) and patches.dtype == torch.float32
    assert stepped.numel() == 32 * 16 * 4
    assert (embed_s, head_s) == (6.0 / 32, 6.0 / 64)


def test_speeds_that_older_versions_stored_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path))
    old = {"cpu float32 dim 24": {"flops_per_s": 3e9, "decode_s_per_pixel": 2e-6}}
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    assert load_speed("cpu", "float32", 24) == Speed(flops_per_s=3e9, decode_s_per_pixel=2e-6)
    store_speed("cpu", "float32", 48, MEASURED)
    assert load_speed("cpu", "float32", 48) == MEASURED
    assert load_speed("cpu", "float32", 24) == Speed(flops_per_s=3e9, decode_s_per_pixel=2e-6)


# The engine and the commands


@pytest.fixture
def slow_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host where one sampler step takes as long as many layers."""
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path / "cache"))
    store_speed("cpu", "float32", 24, Speed(flops_per_s=1e12, sampler_s=100.0))


def test_the_engine_takes_auto(tiny: Path, tmp_path: Path, slow_ends: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        found = Engine(str(tiny), ranks=2, layer_split="auto", device="cpu", outputs=tmp_path)
    assert found.layers == (1, 3)
    assert [len(stage) for stage in found._setup.options.layers] == [1, 3]
    assert "layer_split=auto: 1,3 layers per rank, by measured times" in caplog.text
    request = GenerationRequest(prompt="x", latents_num=4, height=32, width=32)
    assert found.plan(request).placement.layers == (1, 3)


def test_without_a_calibration_auto_goes_by_flops(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path))
    assert Engine(str(tiny), ranks=2, layer_split="auto", device="cpu").layers == (2, 2)
    assert Engine(str(tiny), ranks=2, layer_split="3,1", device="cpu").layers == (3, 1)
    assert Engine(str(tiny), ranks=2, device="cpu").layers == (2, 2)
    with pytest.raises(RequestError, match="layer_split='fast' is not a list of counts"):
        Engine(str(tiny), ranks=2, layer_split="fast", device="cpu")


def test_auto_imports_no_torch(tiny: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from dualparal import Engine; "
        f"print(Engine({str(tiny)!r}, ranks=2, layer_split='auto', device='cpu').layers, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "DUALPARAL_CACHE": str(tmp_path), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "(2, 2) False"


@pytest.mark.parametrize("flag", ["--layer_split", "--layer-split"])
@pytest.mark.parametrize("form", ["{} auto", "{}=auto"])
def test_both_spellings(tiny: Path, slow_ends: None, flag: str, form: str) -> None:
    words = form.format(flag).split()
    command = ["generate", "--prompt", "x", "--model_id", str(tiny), "--ranks", "2", "--device", "cpu", *words]
    options = make_parser().parse_args(command)
    assert make_engine(options).layers == (1, 3)
    served = serve.parser().parse_args(["--model_id", str(tiny), "--ranks", "2", "--device", "cpu", *words])
    assert serve.open_engine(served).layers == (1, 3)


def test_the_plan_command_shows_the_split(tiny: Path, slow_ends: None, capsys: pytest.CaptureFixture[str]) -> None:
    video = ["--latents_num", "9", "--height", "32", "--width", "32"]
    command = ["plan", "--model_id", str(tiny), "--device", "cpu", "--ranks", "2", *video, "--layer-split", "auto"]
    assert main(command) == 0
    assert "2 ranks with 1, 3 layers (the fastest by measured times) in float32" in capsys.readouterr().out
    assert main([*command, "--flops", "1"]) == 0
    assert "2 ranks with 2, 2 layers (the fastest by FLOPs) in float32" in capsys.readouterr().out


# Several hosts


def test_hosts_leave_the_split_to_rank_0(tiny: Path, tmp_path: Path, slow_ends: None) -> None:
    def team(rank: int) -> Team:
        return Team(rank=rank, ranks=2, local_rank=0, local_ranks=1, master_addr="127.0.0.1", master_port=1, run_id="x")

    def options(rank: int, **changes: Any) -> Any:
        return Engine(str(tiny), device="cpu", threads=1, outputs=tmp_path, team=team(rank), **changes)._setup.options

    front = options(0, layer_split="auto")
    assert [len(stage) for stage in front.layers] == [1, 3]
    here = options(1, layer_split="auto")
    dispatcher = RankHost(team(1), here, None, "127.0.0.1", "127.0.0.1")  # type: ignore[arg-type]
    assert dispatcher._merged(front, 0.0).layers == front.layers
    other = RankHost(team(1), options(1), None, "127.0.0.1", "127.0.0.1")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="was started with layers="):
        other._merged(front, 0.0)
