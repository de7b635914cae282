"""Plans of whole jobs: what fits, what is proposed when it does not, times, and the engine's and the command's use of them."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKLWan

from dualparal import Engine, GenerationRequest, devices
from dualparal.cli.main import main
from dualparal.engine import setup as equipment
from dualparal.errors import CheckpointError, RequestError
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Context
from dualparal.model import calibrate
from dualparal.model.known import find_sizes, sizes_of
from dualparal.model.layout import Checkpoint
from dualparal.planning.calibration import load_speed, store_speed
from dualparal.planning.job_plan import JobPlan, balanced_layers, experts_by_step, plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.proposals import BLOCKS, changes_in_words, first_proposal, propose
from dualparal.planning.sizes import PUBLISHED_MODELS
from dualparal.presets import Preset, complete, load_presets
from dualparal.request import SOLVERS, SolverName
from tests.settings import settings

SPEED = Speed(flops_per_s=2e14, decode_s_per_pixel=1e-6)
GB = 10**9


def case(name: str = "wan2.1-14b-480p", ranks: int = 4, gigabytes: float | None = 80, **values: Any) -> tuple[Any, ...]:
    """(request, model, placement) of a preset on `ranks` GPUs that also hold the codec."""
    preset = load_presets()[name]
    model = ModelSizes.published(preset.model)
    assert model is not None
    request = complete(GenerationRequest(prompt="x", **values), preset, ranks=ranks, num_experts=model.num_experts)
    layers = tuple(len(stage) for stage in split_layers(model.config["num_layers"], ranks))
    placement = Placement(
        layers=layers, codec_rank=ranks - 1, bytes_per_device=None if gigabytes is None else int(gigabytes * GB)
    )
    return request, model, placement


def plan(*values: Any, **named: Any) -> JobPlan:
    return plan_job(*case(*values, **named), speed=SPEED)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 10, 20, 40, 50, 200])
def test_experts_equal_the_samplers(num_steps: int, flow_shift: float, solver: SolverName) -> None:
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    factory = SamplerFactory(config, num_steps=num_steps, flow_shift=flow_shift, device="cpu", solver=solver)
    for boundary in (None, 0.1, 0.5, 0.875, 0.9, 1.0):
        request = settings(num_inference_steps=num_steps, flow_shift=flow_shift, solver=solver)
        assert experts_by_step(request.model_copy(update={"boundary_ratio": boundary})) == factory.experts(boundary)


@pytest.mark.parametrize("values", [{}, {"schedule": "preview"}, {"schedule": "preview", "context": "cached"}, {"num_cat": 3}])
def test_a_short_look_sees_the_same_memory(values: dict[str, Any]) -> None:
    request, model, placement = case(seconds=120, **values)
    whole, short = plan_job(request, model, placement), plan_job(request, model, placement, is_short=True)
    assert short.memory == whole.memory
    assert len(short.workload.schedule.items) <= len(whole.workload.schedule.items)


@pytest.mark.parametrize("refresh", [13, 70])
def test_a_short_look_sees_the_longer_windows_of_a_refresh(refresh: int) -> None:
    asked = case(latents_num=600, context="cached", refresh=refresh)
    whole, short = plan_job(*asked).workload, plan_job(*asked, is_short=True).workload
    windows = [
        {work.shape_of(item)[:2] for item in work.schedule.items if 2 < item.block < work.schedule.plan.num_blocks - 2}
        for work in (whole, short)
    ]
    assert windows[0] == windows[1]
    assert {window for window, *_ in windows[0]} == {8, 16}, "own frames, and with the left context"
    assert plan_job(*asked).memory == plan_job(*asked, is_short=True).memory


def test_times_follow_from_the_speed() -> None:
    slow, half, fast = plan(), *(plan_job(*case(), speed=Speed(flops_per_s=rate)) for rate in (2e14, 4e14))
    assert half.sweep_s and fast.sweep_s == pytest.approx(half.sweep_s / 2)
    assert slow.sweep_s and slow.sweep_s > half.sweep_s, "decoding takes its share of the last rank's device"
    assert slow.first_frames_s and slow.total_s and slow.forecast
    decode_s = 1e-6 * 480 * 832
    assert slow.first_frames_s == pytest.approx(slow.forecast.block_done[0] + 16 * decode_s)
    assert slow.total_s >= slow.forecast.total + 8 * decode_s
    assert plan_job(*case()).total_s is None
    assert plan_job(*case(), speed=SPEED, is_short=True).total_s is None


def test_refusals_name_the_number() -> None:
    fits, tight = plan(gigabytes=80), plan(gigabytes=24)
    assert fits.refusal is None
    assert tight.refusal is not None
    assert f"{tight.bytes_per_rank / 1e9:.1f} GB" in tight.refusal and "24.0 GB" in tight.refusal
    assert plan(gigabytes=None).refusal is None, "what is not known refuses nothing"
    request, model, placement = case("wan2.1-1.3b-480p", 2, gigabytes=15)
    alone = plan_job(request, model, replace(placement, codec_rank=None))
    assert alone.refusal is not None and alone.refusal.startswith("the codec needs")


def test_a_host_holds_all_ranks_together() -> None:
    request, model, placement = case("wan2.1-1.3b-480p", 2)
    on_cpu = replace(placement, on_gpu=False, codec_rank=None, dtype="float32", bytes_per_device=60 * GB)
    plan = plan_job(request, model, on_cpu)
    assert plan.bytes_in_all == sum(rank.total for rank in plan.memory.ranks) + plan.memory.codec
    assert plan_job(request, model, replace(on_cpu, bytes_per_device=plan.bytes_in_all)).refusal is None
    refusal = plan_job(request, model, replace(on_cpu, bytes_per_device=plan.bytes_in_all - 1)).refusal
    assert refusal is not None and refusal.startswith("all ranks together need")


def test_a_text_encoder_that_leaves_makes_room() -> None:
    request, model, placement = case()
    kept, freed = (plan_job(request, model, replace(placement, text_encoder=where)).memory for where in ("keep", "cpu"))
    text, decoding = model.text_parameters * 2, kept.codec - model.text_parameters * 2 - model.vae.parameters * 4
    assert kept.codec - freed.codec == min(text, decoding)


def test_the_decode_follows_the_vaes_dtype() -> None:
    """At 720p the weights are the least of it."""
    request, model, placement = case("wan2.1-14b-720p")
    full, half = (plan_job(request, model, replace(placement, vae_dtype=name)).memory for name in ("float32", "bfloat16"))
    saved = full.codec - half.codec
    assert saved == model.vae.parameters * 2 + 720 * 1280 * (53 * 4 - 55 * 2) * 96
    assert 9 * GB < saved < 10 * GB


@pytest.mark.parametrize(
    ("name", "ranks", "gigabytes"),
    [("wan2.1-14b-720p", 4, 24), ("wan2.1-1.3b-480p", 1, 24), ("wan2.2-a14b-480p", 4, 48), ("wan2.1-14b-480p", 8, 24)],
)
def test_what_is_proposed_fits(name: str, ranks: int, gigabytes: float) -> None:
    request, model, placement = case(name, ranks, gigabytes)
    found = propose(request, model, placement, SPEED)
    assert found
    for proposal in found:
        assert proposal.plan.refusal is None
        assert sum(proposal.plan.placement.layers) == model.config["num_layers"]
        assert proposal.plan.total_s and proposal.flags.startswith("--")
    assert len({proposal.flags for proposal in found}) == len(found)


def test_the_issues_command_is_offered_long_blocks() -> None:
    """The codec alone on the fourth card and layers in host memory, not blocks of one latent."""
    found = propose(*case("wan2.1-14b-720p", 4, 24))
    assert found[0].flags.startswith("--ranks 3 --text_encoder cpu --offload")
    assert found[0].plan.placement.codec_rank is None
    assert all(proposal.plan.request.num_per_block >= 4 for proposal in found)
    by_change = [BLOCKS.index((it.plan.request.num_per_block, it.plan.request.num_cat)) for it in found]
    assert by_change == sorted(by_change)


OPTIONS = {"--offload_cache", "--offload", "--schedule", "--context", "--vae_dtype", "--quantization"}


@pytest.mark.parametrize(
    ("name", "ranks", "gigabytes", "values"),
    [
        ("wan2.1-14b-720p", 4, 24, {}), ("wan2.1-14b-480p", 1, 60, {}), ("wan2.1-14b-480p", 1, 32, {}),
        ("wan2.1-14b-480p", 4, 24, {"context": "cached"}),
    ],
)  # fmt: skip
def test_no_proposal_asks_for_more_than_another(name: str, ranks: int, gigabytes: float, values: dict[str, Any]) -> None:
    request, model, placement = case(name, ranks, gigabytes, **values)
    found = [
        proposal
        for proposal in propose(request, model, placement)
        if len(proposal.plan.placement.layers) <= ranks and "--gpus" not in proposal.flags
    ]
    assert len(found) > 1
    for one in found:
        for other in found:
            if one is not other:
                more = OPTIONS & {*one.flags.split()} >= OPTIONS & {*other.flags.split()}
                smaller = one.plan.request.num_per_block <= other.plan.request.num_per_block
                less = one.plan.request.num_cat <= other.plan.request.num_cat
                assert not (more and smaller and less), (one.flags, other.flags)
    for option in ("is_cache_offloaded", "is_offloaded", "vae_dtype", "quantization"):
        for proposal in found:  # none of its options can be left out
            where = proposal.plan.placement
            if getattr(where, option) != getattr(placement, option):
                without = replace(where, **{option: getattr(placement, option)})
                assert plan_job(proposal.plan.request, model, without, is_short=True).refusal is not None
    assert first_proposal(request, model, placement).flags == found[0].flags  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "devices",
    [
        ["--preset", "wan2.1-14b-720p", "--gpus", "4", "--gpu_memory", "24"],
        ["--preset", "wan2.1-14b-480p", "--gpus", "1", "--gpu_memory", "32"],
        [
            "--preset",
            "wan2.1-14b-480p",
            "--gpus",
            "4",
            "--gpu_memory",
            "24",
            "--context",
            "cached",
            "--layer_split",
            "9,9,11,11",
        ],
        ["--preset", "wan2.2-a14b-480p", "--gpus", "2", "--gpu_memory", "60", "--text_encoder", "keep"],
    ],
)
def test_the_flags_of_a_proposal_do_what_it_says(devices: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *devices]) == 1
    printed = capsys.readouterr().out
    proposed = [line.split() for line in printed.splitlines() if line.startswith("  --")]
    assert proposed
    for flags in proposed:
        assert main(["plan", *devices, *flags]) == 0, flags


def test_nothing_is_proposed_for_what_fits_or_cannot() -> None:
    assert propose(*case(gigabytes=80)) == []
    assert propose(*case(gigabytes=None)) == []
    assert propose(*case(gigabytes=2)) == []


def test_layers_move_away_from_the_codec() -> None:
    request, model, placement = case(gigabytes=None)
    layers = balanced_layers(request, model, placement)
    assert sum(layers) == 40 and layers[3] < 10 == placement.layers[3]
    balanced = plan_job(request, model, replace(placement, layers=layers))
    assert balanced.bytes_per_rank < plan_job(request, model, placement).bytes_per_rank


# The model's sizes without a download


def test_published_sizes_equal_a_folders(tiny: Path) -> None:
    sizes = sizes_of(Checkpoint(tiny))
    assert (sizes.num_experts, sizes.config["num_layers"]) == (1, 4)
    assert 0 < sizes.text_parameters < 100_000 and 0 < sizes.vae.parameters < 100_000
    assert find_sizes(str(tiny), Preset()) == sizes
    for name, (config, num_experts, vae) in PUBLISHED_MODELS.items():
        known = find_sizes(name, Preset(model=name))
        assert (known.config, known.num_experts, known.vae) == (config, num_experts, vae)
    with pytest.raises(CheckpointError, match="not known before its download"):
        find_sizes("someone/else", Preset(model="someone/else"))


# The engine


def test_the_engine_refuses_before_anything_starts(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equipment, "bytes_per_device", lambda device: 1000)
    made = Engine(str(tiny), outputs=tmp_path)
    request = GenerationRequest(prompt="x", latents_num=8, height=32, width=32, num_per_block=4, num_cat=2)
    assert made.plan(request).refusal
    with pytest.raises(RequestError, match=r"all ranks together need .* this host has") as refused:
        made.submit(request)
    assert refused.value.field == "num_per_block"
    assert not any(tmp_path.iterdir())


def test_a_refusal_names_what_would_help(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    monkeypatch.setattr(equipment, "bytes_per_device", lambda device: None)
    request = GenerationRequest(prompt="x", latents_num=24, height=32, width=32, num_per_block=8, num_cat=4, context="cached")
    needed = Engine(str(tiny), outputs=tmp_path).plan(request).bytes_per_rank
    monkeypatch.setattr(equipment, "bytes_per_device", lambda device: needed - 1)
    made = Engine(str(tiny), outputs=tmp_path, text_encoder="keep")
    refusal = made.plan(request, is_short=True).refusal
    assert refusal is not None and refusal.endswith("; it would fit with --text_encoder cpu")
    with pytest.raises(RequestError) as refused:
        made.submit(request)
    assert str(refused.value) == refusal
    assert not any(tmp_path.iterdir())


def test_where_the_text_encoder_goes_by_itself() -> None:
    request, model, placement = case("wan2.1-1.3b-480p", 1, 24)

    def settled(**changes: Any) -> str:
        return settle_text_encoder(request, model, replace(placement, **{"text_encoder": "auto", **changes})).text_encoder

    assert settled() == "cpu"
    assert settled(bytes_per_device=40 * GB) == settled(bytes_per_device=None) == "keep"
    on_cpu = {"on_gpu": False, "codec_rank": None, "dtype": "float32"}
    assert settled(**on_cpu) == "free" and settled(**on_cpu, bytes_per_device=99 * GB) == "keep"
    for given in ("keep", "free", "cpu"):
        assert settled(text_encoder=given) == given
    assert plan_job(request, model, replace(placement, text_encoder="cpu")).refusal is None, "1.3B on one card of 24 GB"


def test_an_engine_settles_it_once(tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By the preset's own video, not by what is asked later."""
    caplog.set_level("INFO")
    for room, place in ((None, "keep"), (10**12, "keep"), (10**6, "free")):
        monkeypatch.setattr(equipment, "bytes_per_device", lambda device, room=room: room)
        made = Engine(str(tiny))
        assert made.text_encoder == made._setup.options.engine.text_encoder == place
        assert all(replica.options.engine.text_encoder == place for replica in made.replicas)
        small = GenerationRequest(prompt="x", latents_num=1, height=32, width=32)
        assert made.plan(small).placement.text_encoder == place
        assert caplog.messages.pop() == f"text_encoder=auto: {place}"
    with pytest.raises(RequestError, match="use auto, keep, free, cpu"):
        Engine(str(tiny), text_encoder="gpu")


def test_the_engines_plan(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path))
    made = Engine(str(tiny), ranks=2, layer_split=[3, 1], text_encoder="free", vae_dtype="bf16")
    request = GenerationRequest(prompt="x", latents_num=8, height=32, width=32, num_per_block=4, num_cat=2)
    found = made.plan(request)
    assert found.placement.layers == (3, 1) and found.placement.vae_dtype == "bfloat16" and found.refusal is None
    assert found.total_s is None
    store_speed("cpu", "float32", 24, SPEED)
    assert made.plan(request).total_s
    assert load_speed("cpu", "bfloat16", 24) is None and load_speed("cuda:0", "float32", 24) is None


def test_a_damaged_calibration_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path))
    for text in (
        "",
        "[]",
        "{",
        json.dumps({"cpu float32 dim 24": 3}),
        json.dumps({"cpu float32 dim 24": {"flops_per_s": "x"}}),
    ):
        (tmp_path / "calibration.json").write_text(text)
        assert load_speed("cpu", "float32", 24) is None
    store_speed("cpu", "float32", 24, SPEED)
    assert load_speed("cpu", "float32", 24) == SPEED


def test_memory_of_the_cpu() -> None:
    assert (devices.bytes_per_device("cpu") or 0) > 2**28


def test_cards_are_numbered_as_their_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    devices.use_pci_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    devices.use_pci_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST", "whoever set it knows why"


# The command


def test_the_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "wan2.1-14b-720p", "--gpus", "4", "--gpu-memory", "25", "--flops", "200"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit: rank 3 needs" in out and "the text encoder waits in host memory" in out
    for words in (
        "least change of the video first:\n\n  --ranks 3",
        "a sweep up to",
        "the codec on a GPU of its own",
        "0.03 dB",
    ):
        assert words in out
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", "--gpus", "1", "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "It fits the 24.0 GB" in out and "add --calibrate on the machine itself" in out
    assert (
        main(["plan", "--preset", "wan2.1-14b-480p", "--gpus", "8", "--gpu-memory", "48", "--layer_split", "6,6,6,6,6,5,5"])
        == 0
    )
    out = capsys.readouterr().out
    assert "7 ranks with 6, 6, 6, 6, 6, 5, 5 layers" in out and "device of its own" in out
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", "--device", "cpu", "--latents_num", "3", "--width", "64"]) in (0, 1)
    assert "on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpus", "0"],
        ["--gpu-memory", "24", "--device", "cpu"],
        ["--gpus", "2", "--ranks", "3"],
        ["--gpus", "2", "--flops", "0"],
        ["--gpus", "2", "--layer_split", "1,2"],
        ["--gpus", "2", "--dtype", "int8"],
        ["--gpus", "2", "--num_cat", "9"],
        ["--gpus", "2", "--layer_split", "a"],
    ],
)
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_calibration_on_this_cpu(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("DUALPARAL_CACHE", str(tmp_path))
    small = functools.partial(AutoencoderKLWan, base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    monkeypatch.setattr(calibrate, "AutoencoderKLWan", small)
    command = ["plan", "--model_id", str(tiny), "--device", "cpu", "--latents_num", "9", "--height", "32", "--width", "32"]
    assert main([*command, "--calibrate"]) == 0
    assert "as measured on this host's cpu" in capsys.readouterr().out
    assert main(command) == 0
    assert "first frames after" in capsys.readouterr().out


# Low memory


def test_8_bit_weights_and_offload_in_the_plan() -> None:
    request, model, placement = case("wan2.1-14b-480p", 2)
    plain, fp8, away, both = (
        plan_job(request, model, replace(placement, quantization=kind, is_offloaded=is_offloaded)).memory
        for kind, is_offloaded in ((None, False), ("fp8", False), (None, True), ("fp8", True))
    )
    assert 0.5 < fp8.ranks[0].weights / plain.ranks[0].weights < 0.53
    assert plain.ranks[0].activations <= fp8.ranks[0].activations <= plain.ranks[0].activations + 2 * 5120 * 13824
    layer = plain.ranks[0].weights - plan_job(request, model, replace(placement, layers=(19, 21))).memory.ranks[0].weights
    assert plain.ranks[0].weights - away.ranks[0].weights == 18 * layer
    assert plain.ranks[1].weights - away.ranks[1].weights == 18 * layer
    # The matrices' 52.4 and 141.6 MB are pinned in 2^26 and 2^28 bytes.
    pinned = layer + 8 * (2**26 - 5120 * 5120 * 2) + 2 * (2**28 - 5120 * 13824 * 2)
    assert (plain.host_layers, away.host_layers) == (0, 40 * pinned)
    assert both.ranks[1].weights < away.ranks[1].weights and 0.5 < both.host_layers / away.host_layers < 0.53
    assert fp8.ranks[0].feature_cache == away.ranks[0].feature_cache == plain.ranks[0].feature_cache


def test_left_caches_in_host_memory_in_the_plan() -> None:
    request, model, placement = case("wan2.1-14b-480p", 4, context="cached", schedule="preview", micro_batches=False)
    here, away = (plan_job(request, model, replace(placement, is_cache_offloaded=it)).memory for it in (False, True))
    one = 2 * 8 * 1560 * 5120 * 2 * 2  # K and V of 8 latents, both guidance halves, one layer
    right = 10 * one  # what the right neighbour's pass left for the one that runs
    assert (here.host_caches, away.host_caches % (40 * one)) == (0, 0)
    assert away.ranks[0].feature_cache == right + 5 * one
    assert away.host_caches // 4 <= here.ranks[0].feature_cache <= away.host_caches // 4 + right
    assert replace(here.ranks[0], feature_cache=0) == replace(away.ranks[0], feature_cache=0)


@pytest.mark.parametrize("what", ["is_offloaded", "is_cache_offloaded"])
def test_a_slow_link_to_host_memory_is_in_the_times(what: str) -> None:
    """Nothing while copies hide behind the work; else a block step takes what the copies take."""
    request, model, placement = case("wan2.1-14b-480p", 2, context="cached", schedule="preview", guidance_scale=1.0)
    away = replace(placement, **{what: True})
    fast, slow, unknown = (replace(SPEED, link_bytes_per_s=rate) for rate in (1e12, 1e9, None))
    free = plan_job(request, model, placement, speed=slow)
    assert (
        free.total_s
        == plan_job(request, model, away, speed=fast).total_s
        == plan_job(request, model, away, speed=unknown).total_s
    )
    bound = plan_job(request, model, away, speed=slow)
    item = next(it for it in bound.workload.schedule.items if it.step and it.keeps_tail and it.left is Context.CACHE)
    num_bytes = {"is_offloaded": away_bytes(bound), "is_cache_offloaded": 2 * 8 * 1560 * 5120 * 2}[what]
    assert bound.step_times(item).layer == pytest.approx(num_bytes / 1e9)
    assert free.total_s and bound.total_s and bound.total_s > 1.5 * free.total_s


def away_bytes(plan: JobPlan) -> int:
    """Of one offloaded layer."""
    return plan.workload.sizes.layer.num_bytes("bfloat16")


def test_two_experts_share_the_room_of_offloaded_layers() -> None:
    request, model, placement = case("wan2.2-a14b-480p", 2)
    found = plan_job(request, model, replace(placement, is_offloaded=True)).memory
    one = plan_job(request, replace(model, num_experts=1), replace(placement, is_offloaded=True)).memory
    assert found.host_layers == 2 * one.host_layers
    assert found.ranks[1].weights - one.ranks[1].weights < one.host_layers / 40, "the output head only"


def test_tiny_blocks_are_warned_of() -> None:
    request, model, placement = case()
    asked = plan_job(request, model, placement)
    for num_per_block, is_warned in ((6, False), (4, False), (3, True), (1, True)):
        smaller = request.model_copy(update={"num_per_block": num_per_block, "num_cat": 0})
        words = " ".join(changes_in_words(asked, plan_job(smaller, model, placement)))
        assert "more seams" in words and ("these blocks are tiny" in words) == is_warned
    assert changes_in_words(asked, asked) == []


def test_low_memory_is_proposed_where_it_helps() -> None:
    request, model, placement = case("wan2.1-14b-480p", 1, gigabytes=60)
    flags = [proposal.flags for proposal in propose(request, model, placement)]
    assert "--offload" in flags and "--text_encoder cpu --quantization fp8" in flags
    tight = [proposal.flags for proposal in propose(request, model, replace(placement, bytes_per_device=32 * GB))]
    assert any(flag.startswith("--text_encoder cpu --offload --num_per_block") for flag in tight)
    request, model, placement = case("wan2.1-14b-480p", 4, gigabytes=32, context="cached", schedule="preview")
    cached = propose(request, model, placement)
    assert cached[0].flags == "--text_encoder cpu --offload_cache"
    assert any(
        "of host memory: the same bits" in line
        for line in changes_in_words(plan_job(request, model, placement), cached[0].plan)
    )
    on_cpu = replace(placement, on_gpu=False, codec_rank=None)
    assert not any("--offload" in proposal.flags for proposal in propose(request, model, on_cpu))


def test_the_command_knows_low_memory(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--preset", "wan2.1-14b-480p", "--gpus", "1", "--gpu-memory", "48", "--text-encoder", "cpu"]
    assert main(command) == 1
    assert main([*command, "--offload", "--quantization", "fp8"]) == 0
    printed = capsys.readouterr().out
    assert "(weights in fp8), which wait in host memory" in printed
    assert "Offloaded layers: 21.5 GB of host memory" in printed
    cached = ["plan", "--preset", "wan2.1-14b-480p", "--gpus", "4", "--gpu-memory", "48", "--context", "cached"]
    assert main([*cached, "--offload_cache", "--flops", "100"]) == 0
    printed = capsys.readouterr().out
    assert (
        "left caches in host memory" in printed
        and "Offloaded left caches: " in printed
        and ", caches on their way left out" in printed
    )
    assert main(["plan", "--preset", "wan2.1-1.3b-480p", "--device", "cpu", "--offload"]) == 2
    assert "without a GPU" in capsys.readouterr().err
