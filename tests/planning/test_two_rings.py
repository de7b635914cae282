"""What two rings need and how long they take, and what is said where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dualparal.cli.main import main
from dualparal.errors import RequestError
from dualparal.method.grid import Grid
from dualparal.planning.job_plan import JobPlan, balanced_layers, fastest_layers, plan_job
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.proposals import changes_in_words, even_layers, propose
from dualparal.planning.rings import in_other_rings
from dualparal.presets import complete, load_presets
from dualparal.request import GenerationRequest

GB = 10**9
PRESET = load_presets()["wan2.1-14b-480p"]
_found = ModelSizes.published(PRESET.model)
assert _found is not None
MODEL = _found


def plan(ranks: int, guidance: int, gigabytes: float = 80, **values: Any) -> JobPlan:
    placement = Placement(
        layers=even_layers(40, ranks // guidance), guidance=guidance, codec_rank=ranks - 1, text_encoder="cpu",
        bytes_per_device=int(gigabytes * GB),
    )  # fmt: skip
    asked = GenerationRequest(**{"prompt": "x", "seed": 0, "seconds": 20, "schedule": "preview", **values})
    request = complete(asked, PRESET, ranks=ranks // guidance, rings=guidance, has_room=True)
    return plan_job(request, MODEL, placement, speed=Speed(flops_per_s=3e14))


def test_ranks_of_two_rings() -> None:
    grid = Grid.of(8, 2)
    assert (grid.stages, grid.ranks) == (4, 8) and [grid.ring_of(rank) for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert [(edge.source, edge.target) for edge in Grid(2, 2).edges()] == [(0, 1), (1, 0), (0, 2), (2, 3), (3, 0)]
    assert [(edge.source, edge.target) for edge in Grid(1, 2).edges()] == [(0, 1), (1, 0)]
    assert [(edge.source, edge.target) for edge in Grid(3).edges()] == [(0, 1), (1, 2), (2, 0)] and not list(Grid().edges())
    with pytest.raises(
        RequestError, match=r"ranks=3 does not go with guidance_parallel=2.*use ranks=4, or guidance_parallel=1"
    ):
        Grid.of(3, 2)


def test_each_ring_holds_its_own_half() -> None:
    two = plan(8, 2)
    one = plan_job(two.request, MODEL, replace(two.placement, guidance=1, codec_rank=3))
    first, second = two.memory.ranks[:4], two.memory.ranks[4:]
    for stage in range(4):
        assert first[stage].weights == second[stage].weights == one.memory.ranks[stage].weights
        assert first[stage].feature_cache + second[stage].feature_cache == one.memory.ranks[stage].feature_cache > 0
        assert first[stage].text == second[stage].text < one.memory.ranks[stage].text
    assert first[0].latents == one.memory.ranks[0].latents > 0 and second[0].latents == 0
    assert [bool(rank.codec) for rank in two.memory.ranks] == [False] * 7 + [True]
    alone = plan(8, 2, guidance_scale=1.0)
    assert alone.memory.ranks[5].feature_cache == alone.memory.ranks[5].activations == 0, "the second ring has nothing to do"
    away = replace(two.placement, is_cache_offloaded=True, is_offloaded=True)
    both = plan_job(two.request, MODEL, away).memory
    alike = plan_job(two.request, MODEL, replace(away, guidance=1, codec_rank=3)).memory
    assert both.host_caches == alike.host_caches and both.host_layers == 2 * alike.host_layers, "left caches are halved"


def test_first_frames_come_sooner_and_the_rest_no_later() -> None:
    one, two = plan(8, 1), plan(8, 2)
    assert two.request.micro_batches
    assert two.first_frames_s and one.first_frames_s and two.first_frames_s < one.first_frames_s
    assert two.total_s and one.total_s and two.total_s < 1.01 * one.total_s
    assert two.sweep_s and two.forecast and len(two.forecast.busy) == 8
    alone = plan(8, 2, guidance_scale=1.0)
    assert alone.forecast and alone.forecast.busy[4:] == (0.0,) * 4


def test_layers_are_split_for_the_slower_ring() -> None:
    two = plan(8, 2)
    slow_decode = Speed(flops_per_s=3e14, decode_s_per_pixel=1e-5)
    layers = fastest_layers(two.request, MODEL, two.placement, slow_decode)
    assert sum(layers) == 40 and layers[-1] < 10, "the last rank decodes too"
    assert sum(balanced_layers(two.request, MODEL, two.placement)) == 40


def test_one_ring_is_a_way_out() -> None:
    """Where no layer split makes two fit."""
    tight = plan(8, 2, gigabytes=38)
    assert tight.refusal is not None and plan(8, 1, gigabytes=38).refusal is None
    best = propose(tight.request, MODEL, tight.placement)[0]
    assert "--guidance_parallel 1" in best.flags and best.plan.request == tight.request, "the same bits"
    assert best.plan.placement.guidance == 1 and len(best.plan.placement.layers) == 8
    assert changes_in_words(tight, best.plan)[0] == "the guidance halves on the same ranks: the same bits, first frames later"


def test_the_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model_id", PRESET.name, "--gpu_memory", "80", "--seconds", "10", "--guidance_parallel", "2"]
    assert main([*command, "--gpus", "8", "--guidance_scale", "1"]) == 0
    said = capsys.readouterr().out
    assert "8 ranks, two rings of stages, with 10, 10, 10, 10 layers" in said
    assert "note: without guidance half of the 8 ranks have nothing to do: --guidance_parallel 1" in said
    assert main([*command, "--gpus", "3"]) == 2
    assert "ranks=3 does not go with guidance_parallel=2" in capsys.readouterr().err
    assert main([*command, "--gpus", "4", "--micro_batches", "off"]) == 2
    assert "micro_batches is off, and guidance_parallel=2" in capsys.readouterr().err


def test_the_plan_shows_the_other_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Total, first frames and memory; nothing without guidance, for an odd number of ranks, or more than there are layers."""
    command = ["plan", "--model_id", PRESET.name, "--gpu_memory", "80", "--seconds", "10", "--flops", "300", "--gpus"]
    one, two = plan(8, 1), plan(8, 2)
    back = in_other_rings(two, MODEL)
    assert back and (back.placement, back.request) == (one.placement, two.request)
    assert main([*command, "8"]) == 0
    assert "with --guidance_parallel 2, two rings: first frames after " in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("on a rank; the same bits")
    assert main([*command, "4", "--guidance_parallel", "2", "--gpu_memory", "55", "--offload_cache"]) == 0
    assert "with --guidance_parallel 1, one ring: " in capsys.readouterr().out
    for more in (["8", "--guidance_scale", "1"], ["7"]):
        assert main([*command, *more]) == 0
        assert "--guidance_parallel" not in capsys.readouterr().out
