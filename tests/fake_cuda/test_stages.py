"""Stages at real sizes on a card that is not there: devices, dtypes and shapes of every operation, float32 products, waits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from dualparal.method import sampler as sampler_module
from dualparal.method.grid import Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules, Schedule, make_schedule
from dualparal.model import stage as stage_module
from dualparal.model.checkpoint import WeightsOnMeta, _drop_foreign, keeps_float32
from dualparal.model.low_memory import Quantizer
from dualparal.model.stage import JobShape, Stage
from dualparal.model.vae import StreamingDecoder, to_uint8
from dualparal.planning.sizes import WAN_1_3B, WAN_5B, WAN_14B
from dualparal.request import SolverName
from dualparal.ring import transport
from dualparal.ring.denoiser import Denoiser
from dualparal.ring.stage_loop import SpanLog
from dualparal.ring.transport import DistributedEdge, SoloLinks, edge_device
from tests.fake_cuda.card import CARD, Notes, fake_card, put

NUM_LAYERS = 3  # a stage each where there are three: they are all alike
LATENTS = (60, 104)  # 480 x 832
TEXT = (1, 512, 4096)
SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def stages_of(config: dict[str, Any], num_experts: int, split: Sequence[range], **options: Any) -> list[Stage]:
    whole = {**config, "num_layers": NUM_LAYERS}

    def share(
        checkpoint: Any, component: str, layers: range, *, dtype: torch.dtype, quantization: str | None, **_: Any
    ) -> WanTransformer3DModel:
        with WeightsOnMeta():
            model = WanTransformer3DModel(**whole)
        _drop_foreign(model, layers)
        quantizer = Quantizer(model, quantization, dtype)
        put(model, lambda name: quantizer.storage_dtype(name, torch.float32 if keeps_float32(name) else dtype))
        quantizer.finish()
        return model.requires_grad_(False).eval()

    checkpoint = SimpleNamespace(
        num_layers=NUM_LAYERS, transformers=("transformer", "transformer_2")[:num_experts], config=lambda part: whole,
        has_token_times=whole["in_channels"] == 48,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "load_transformer_share", share)
        return [Stage(checkpoint, layers, device="cuda:0", **{"dtype": "bfloat16", **options}) for layers in split]  # type: ignore[arg-type]


def run(stages: Sequence[Stage], schedule: Schedule, shape: JobShape, dtype: torch.dtype, notes: Notes) -> None:
    """A job's items through all stages in order, as a ring runs them."""
    texts = [[torch.empty(TEXT)] * shape.num_halves]
    conditions = stages[0].embed_conditions(torch.arange(schedule.num_steps), texts)
    for stage in stages:
        stage.begin(shape, schedule, conditions)
    for seen in (notes.kernels, notes.products, notes.syncs):
        seen.clear()
    for item in schedule.items:
        frames = sum(schedule.window_frames(item))
        carried = torch.empty(1, stages[0].channels, frames, *LATENTS, device=CARD)
        for stage in stages:
            out = stage.run(item, carried)
            if stage.is_last:
                if shape.num_halves == 2 and item.half == 0:
                    assert out is None
                    continue
                assert out is not None and out.dtype == torch.float32
                assert tuple(out.shape) == stage.prediction_shape(item)
            else:
                assert out is not None and out.dtype == dtype
                assert tuple(out.shape) == stage.hidden_shape(item)
            assert out.device == CARD and out.is_contiguous()
            carried = out
    for stage in stages:
        stage.end()


def waits_in(notes: Notes) -> list[tuple[str, int]]:
    """Of each line that waits, its file and how often."""
    return sorted((line.partition(":")[0], times) for line, times in notes.syncs.items())


SPLITS = {"only": [range(NUM_LAYERS)], "three": [range(1), range(1, 2), range(2, 3)]}
CONTEXTS = {
    "paper recomputed": Rules(left_context="latest", context="recomputed"),
    "paper cached": Rules(left_context="latest", context="cached", refresh=3),
    "preview cached": Rules(max_in_flight=2, stagger=2, left_context="own_step", context="cached", micro_batches=True),
}


def test_a_clean_picture_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = make_schedule(CONTEXTS["preview cached"], BlockPlan.of(20, 8, 8, picture=True), (0,) * 4)
    with fake_card(monkeypatch) as notes:
        stages = stages_of(WAN_5B, 1, SPLITS["three"])
        shape = JobShape(*LATENTS, 2, (5.0, 4.0), (0,) * schedule.plan.num_blocks)
        run(stages, schedule, shape, torch.bfloat16, notes)
    assert not notes.products and notes.syncs.keys() == {"stream"}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("config", "num_experts", "dtype", "quantization"),
    [(WAN_1_3B, 1, "bfloat16", None), (WAN_14B, 1, "float16", None), (WAN_14B, 2, "bfloat16", "fp8")],
    ids=["1.3B", "14B", "A14B fp8"],
)  # fmt: skip
def test_every_item_of_a_job(
    config: dict[str, Any], num_experts: int, dtype: str, quantization: str | None, context: str, split: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    experts = (0, 0, 1, 1) if num_experts == 2 else (0,) * 4
    schedule = make_schedule(CONTEXTS[context], BlockPlan.of(20, 8, 8), experts)
    with fake_card(monkeypatch) as notes:
        stages = stages_of(config, num_experts, SPLITS[split], dtype=dtype, quantization=quantization)
        shape = JobShape(*LATENTS, 2, (5.0, 4.0), (0,) * schedule.plan.num_blocks)
        run(stages, schedule, shape, getattr(torch, dtype), notes)
    assert not notes.products, "matrices of float32 are multiplied at a fraction of the speed"
    assert notes.syncs.keys() == {"stream"}, "the host waits for the card inside a block step"
    assert notes.syncs["stream"] == len(schedule.items) * len(stages)
    assert notes.kernels["scaled_dot_product_attention"] == 2 * NUM_LAYERS * len(schedule.items)


def test_rank_0_waits_once_more_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, windows, solver and finished blocks beside its stage; the wait is the look for NaN."""
    schedule = make_schedule(CONTEXTS["preview cached"], BlockPlan.of(20, 8, 8), (0,) * 6)
    samplers = SamplerFactory(SOLVER, num_steps=6, flow_shift=3.0, device="cpu")
    blocks: dict[int, torch.Tensor] = {}
    with fake_card(monkeypatch) as notes:
        samplers.timesteps = samplers._template.timesteps = samplers.timesteps.to(CARD)  # as it is made on a card
        (stage,) = stages_of(WAN_1_3B, 1, SPLITS["only"])
        shape = JobShape(*LATENTS, 2, (5.0, 5.0), (0,) * schedule.plan.num_blocks)
        stage.begin(shape, schedule, stage.embed_conditions(samplers.timesteps, [[torch.empty(TEXT)] * 2]))
        notes.syncs.clear()
        noise = (torch.empty(1, 16, length, *LATENTS) for length in schedule.plan.lengths)
        denoiser = Denoiser(
            stage, SoloLinks(), schedule, samplers, noise, is_stopped=lambda: False, on_step=lambda item: None,
            on_block=lambda block, latents: blocks.update({block: latents}), spans=SpanLog("stage 0", lambda _: None),
        )  # fmt: skip
        assert denoiser.run()
    assert [(x.device, x.dtype, x.shape[2]) for x in blocks.values()] == [
        (CARD, torch.float32, length) for length in schedule.plan.lengths
    ]
    num_steps = sum(item.is_whole for item in schedule.items)
    assert notes.syncs.pop("stream") == len(schedule.items)
    assert waits_in(notes) == [("denoiser.py", schedule.plan.num_blocks), ("denoiser.py", num_steps)]  # a block's noise comes


@pytest.mark.parametrize(("solver", "most_kernels"), [("unipc", 17), ("dpm++", 8), ("euler", 2)])
def test_a_solver_waits_for_nothing(solver: SolverName, most_kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step multiplies by is known on the host; the multiplications are all that a card sees of it."""
    notes = steps_of(solver, monkeypatch)
    assert not notes.syncs
    assert notes.kernels.total() <= NUM_STEPS * most_kernels, notes.kernels


NUM_STEPS = 6


def steps_of(solver: SolverName, monkeypatch: pytest.MonkeyPatch) -> Notes:
    samplers = SamplerFactory(SOLVER, num_steps=NUM_STEPS, flow_shift=3.0, device="cpu", solver=solver)
    with fake_card(monkeypatch) as notes:
        samplers.timesteps = samplers._template.timesteps = samplers.timesteps.to(CARD)
        latents = torch.empty(1, 16, 8, *LATENTS, device=CARD)
        notes.syncs.clear()
        notes.kernels.clear()
        sampler = samplers.new()
        for _ in range(NUM_STEPS):
            latents = sampler.step(torch.empty_like(latents), latents)
    assert latents.device == CARD
    return notes


class Wire:
    """An edge that is told what is sent and has made up what comes; messages that come lie on the host."""

    holds_up_the_device = False

    def __init__(self) -> None:
        self.sent: list[torch.device] = []
        self.posted: list[int] = []
        self.num_given_back = 0

    def send(self, message: torch.Tensor) -> None:
        self.sent.append(message.device)

    def post(self, num_elements: int, dtype: torch.dtype) -> None:
        self.posted.append(num_elements)

    def take(self) -> torch.Tensor:
        return torch.empty(self.posted.pop(0))

    def give_back(self, message: torch.Tensor) -> None:
        self.num_given_back += 1

    def flush(self) -> None:
        pass


def test_predictions_come_to_rank_0_through_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = make_schedule(CONTEXTS["paper recomputed"], BlockPlan.of(20, 8, 8), (0,) * 4)
    samplers = SamplerFactory(SOLVER, num_steps=4, flow_shift=3.0, device="cpu")
    there, back = Wire(), Wire()
    blocks: dict[int, torch.Tensor] = {}
    with fake_card(monkeypatch):
        samplers.timesteps = samplers._template.timesteps = samplers.timesteps.to(CARD)
        stage = stages_of(WAN_1_3B, 1, SPLITS["three"])[0]
        shape = JobShape(*LATENTS, 2, (5.0, 5.0), (0,) * schedule.plan.num_blocks)
        stage.begin(shape, schedule, stage.embed_conditions(samplers.timesteps, [[torch.empty(TEXT)] * 2]))
        noise = (torch.empty(1, 16, length, *LATENTS) for length in schedule.plan.lengths)
        links = SimpleNamespace(rank=0, grid=Grid(3), incoming=back, outgoing=there, beside=None)
        denoiser = Denoiser(
            stage, links, schedule, samplers, noise, is_stopped=lambda: False, on_step=lambda item: None,
            on_block=lambda block, latents: blocks.update({block: latents}), spans=SpanLog("stage 0", lambda _: None),
        )  # fmt: skip
        assert denoiser.run()
    assert {*there.sent} == {CARD} and len(there.sent) == len(schedule.items) == back.num_given_back
    assert {x.device for x in blocks.values()} == {CARD} and len(blocks) == schedule.plan.num_blocks


def test_the_last_rank_sends_them_from_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(transport.dist, "isend", lambda message, *_, **__: sent.append(message))
    monkeypatch.setattr(transport, "_buffers", transport.Buffers())
    made = torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        assert pin_memory == (options.get("device") == torch.device("cpu"))  # it cannot be done without CUDA
        return made(*size, **options)

    with fake_card(monkeypatch):
        edges = list(Grid(3).edges())
        message = torch.empty(7, device=CARD)
        monkeypatch.setattr(torch, "empty", unpinned)
        DistributedEdge(0, None, edge_device(edges[2], CARD), 60).send(message)
        DistributedEdge(2, None, edge_device(edges[1], CARD), 60).send(message)
    assert [(one.device.type, one.numel()) for one in sent] == [("cpu", 7), ("cuda", 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_come_to_the_host_once_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan().eval().requires_grad_(False)
    with fake_card(monkeypatch) as notes:
        put(vae, lambda name: dtype)
        decoder = StreamingDecoder(vae)
        for first, length in ((True, 3), (False, 2)):
            frames = to_uint8(decoder.decode(torch.empty(1, 16, length, 16, 24)))
            assert frames.dtype == torch.uint8 and frames.device.type == "cpu"
            assert tuple(frames.shape) == (4 * length - 3 * first, 128, 192, 3)
    assert waits_in(notes) == [("vae.py", 1), ("vae.py", 1), ("vae.py", 2), ("vae.py", 2)]  # two tables; there and back
    assert bool(notes.products) == (dtype == torch.float32)


# Mutants: what the instrument is there to find is found.


def one_item(monkeypatch: pytest.MonkeyPatch) -> Notes:
    schedule = make_schedule(Rules(), BlockPlan.of(8, 8, 8), (0,))
    with fake_card(monkeypatch) as notes:
        stages = stages_of(WAN_1_3B, 1, SPLITS["only"])
        run(stages, schedule, JobShape(*LATENTS, 2, (5.0, 5.0), (0,)), torch.bfloat16, notes)
    return notes


def test_a_table_that_was_left_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Stage._rope_table
    monkeypatch.setattr(Stage, "_rope_table", lambda self, frames: table(self, frames).cpu())
    with pytest.raises(RuntimeError, match="two devices"):
        one_item(monkeypatch)


def test_a_product_in_float32_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(model: WanTransformer3DModel, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        weight = model.proj_out.weight.float()
        return torch.nn.functional.linear(hidden.float(), weight)

    monkeypatch.setattr(stage_module, "output_head", head)
    assert list(one_item(monkeypatch).products.values()) == [1]


def test_a_wait_inside_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = stage_module.embed_patches

    def waiting(model: WanTransformer3DModel, window: torch.Tensor, num_halves: int) -> torch.Tensor:
        assert window.abs().max().item() >= 0
        return embed(model, window, num_halves)

    monkeypatch.setattr(stage_module, "embed_patches", waiting)
    assert one_item(monkeypatch).syncs.keys() > {"stream"}


def test_a_solver_that_works_on_the_card_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own: numbers that depend on the step alone are brought to the card, worked out there, and solved for."""
    monkeypatch.setattr(sampler_module, "SharedUniPC", UniPCMultistepScheduler)
    notes = steps_of("unipc", monkeypatch)
    assert notes.syncs.total() > 4 * NUM_STEPS and notes.kernels.total() > 60 * NUM_STEPS
