"""The distillation: films are made as the engine makes them, targets are the teacher's, the file is the student's, a run goes
on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dualparal.method.noise import coordinated_noise
from dualparal.method.sampler import SamplerFactory
from dualparal.method.schedule import Rules
from dualparal.model.checkpoint import load_transformer_share
from dualparal.model.layout import Checkpoint
from dualparal.model.lora_source import find_loras
from dualparal.model.source import POCKET_WEIGHTS
from tests.local_ring import denoise_in_threads
from training import distill, films

CHANNELS = 12


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "NUM_FILMS", 1)
    monkeypatch.setattr(films, "NUM_LATENTS", 32)
    monkeypatch.setattr(distill, "USES", 2)


@pytest.fixture
def student() -> distill.Student:
    """One that has learnt something."""
    torch.manual_seed(1)
    student = distill.Student()
    with torch.no_grad():
        for lora in student.loras.values():
            lora.up.normal_(std=0.02)
    return student


def test_levels_are_those_that_euler_steps_through() -> None:
    sampler = SamplerFactory({}, num_steps=distill.NUM_STEPS, flow_shift=distill.SHIFT, device="cpu", solver="euler")
    assert distill.levels() == pytest.approx(sampler.sigmas)


def loras_of(student: distill.Student) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in student.named_parameters() if name.endswith((".down", ".up"))}


def test_films_are_what_the_engine_makes(student: distill.Student, tmp_path: Path) -> None:
    distill.save_file(distill.as_file(loras_of(student)), tmp_path / "x.safetensors")
    with torch.no_grad():
        for value in loras_of(student).values():
            value.copy_(value.half())
    caption, plan = "a red circle bouncing on a navy background", films.block_plan()
    noise = list(coordinated_noise(plan, films.NUM_PER_BLOCK, 5, channels=CHANNELS, height=8, width=8))
    with torch.no_grad():
        states, caches = films.student_way(student, noise, distill.levels(), student.read([caption]))
        ends = []
        for block, way in enumerate(states):
            made = films.Films([caption], [torch.stack(way) for way in states], [], caches)
            velocity, _ = student.pass_of(way[3], distill.levels()[3], student.read([caption]), *made.around(block, 3))
            ends.append(way[3] - distill.levels()[3] * velocity)
    tokens = student.tokenizer([caption], return_tensors="pt").input_ids
    with torch.no_grad():
        text = torch.nn.functional.pad(student.text_encoder(tokens).last_hidden_state, (0, 0, 0, 512 - tokens.shape[1]))
    blocks = denoise_in_threads(
        POCKET_WEIGHTS, latents_num=films.NUM_LATENTS, num_per_block=films.NUM_PER_BLOCK, num_cat=films.NUM_CAT, steps=4,
        texts=[[text]], guidance=(1.0, 1.0), flow_shift=distill.SHIFT, solver="euler", size=(8, 8), noise=noise,
        rules=Rules(context="cached"), beside=find_loras([str(tmp_path / "x.safetensors")], 1),
    )  # fmt: skip
    assert [way[0].shape[2] for way in states] == list(plan.lengths)
    for block, end in enumerate(ends):
        assert (blocks[block] - end).abs().max() < 0.02, "K and V are kept in half precision while training"


def test_the_targets_are_the_teachers_whatever_the_student_has_learnt(student: distill.Student) -> None:
    made = films.make_films(student, distill.levels(), np.random.default_rng(0), CHANNELS)
    text, nothing = student.read(made.captions), student.read([""])
    here, there = distill.levels()[2:4]
    whole = torch.cat([way[2].float() for way in made.x], dim=2)
    lengths = films.block_plan().lengths
    assert [way.shape[3] for way in made.target] == list(lengths) and sum(lengths) == whole.shape[2]

    def guided(x: torch.Tensor, level: float) -> torch.Tensor:
        for lora in student.loras.values():
            torch.nn.init.zeros_(lora.up)
        plain = [student.pass_of(x, level, one, None, None)[0] for one in (nothing, text)]
        return torch.lerp(*plain, distill.GUIDANCE)

    with torch.no_grad():
        window = whole[:, :, : lengths[0] + films.TEACHERS_CONTEXT]
        first = guided(window, here)
        wanted = guided(window + (there - here) / 2 * first, (here + there) / 2)[:, :, : lengths[0]]
    assert (wanted - made.target[0][2].float()).abs().max() < 0.02, "half precision"


def test_the_teacher_goes_along_its_flow_in_so_many_parts() -> None:
    x = torch.tensor([2.0])
    velocity = films.teachers_way(lambda y, level: y / level, x, 1.0, 0.5, 1)
    assert torch.allclose(velocity, x), "of a straight flow the midpoint rule is exact"
    errors = [abs(float(films.teachers_way(lambda y, level: y, x, 1.0, 0.0, n)) - 2 * (1 - np.exp(-1))) for n in (1, 4)]
    assert errors[1] < errors[0] / 10


def test_every_block_is_aimed_at_in_one_group() -> None:
    assert films.groups_of_blocks(5, starts_late=False) == [range(1), range(1, 3), range(3, 5)]
    assert films.groups_of_blocks(5, starts_late=True) == [range(1), range(1, 2), range(2, 4), range(4, 5)]


def test_neighbours_are_seen_at_the_blocks_own_step_and_the_one_before(student: distill.Student) -> None:
    made = films.make_films(student, distill.levels(), np.random.default_rng(2), CHANNELS)
    assert made.around(0, 0) == (None, None), "the next block has not entered"
    (left, right), last = made.around(1, 2), len(made.x) - 1
    assert left is not None and right is not None
    assert torch.equal(left[3][0], made.caches[0][2][3][0].float()) and left[3][0].shape[1] == 8 * 16
    assert torch.equal(right[3][1], made.caches[2][1][3][1].float())
    assert made.around(last, 3)[1] is None


def test_left_context_is_recomputed_now_and_then(student: distill.Student, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = films.make_films(student, distill.levels(), np.random.default_rng(3), CHANNELS), []
    monkeypatch.setattr(student, "pass_of", lambda *asked: seen.append(asked) or (asked[0][:, :, asked[5] :], {}))
    for seed in range(40):
        assert distill.loss_of(student, made, np.random.default_rng(seed)).isfinite()
    recomputed = [(x, left) for x, _, _, left, _, num_left in seen if num_left]
    assert 0 < len(recomputed) < 15
    for x, left in recomputed:
        assert left is None and x.shape[2] == 16
    assert any(left is not None for _, _, _, left, _, _ in seen)


def test_borders_weigh_more() -> None:
    weight = distill.border_weight(8).flatten()
    assert weight.mean() == pytest.approx(1) and weight[0] == weight[-1] == pytest.approx(2 * float(weight[3]))


def test_it_goes_on_where_it_was_and_its_file_is_the_students(tmp_path: Path) -> None:
    for num_steps in (2, 4):
        for _ in distill.training_steps(tmp_path, 0, num_steps):
            pass
    state = torch.load(tmp_path / "distill.pt", weights_only=False)
    assert state["step"] == 4
    assert all(value.abs().max() > 0 for value in state["lora"].values())
    distill.export(tmp_path, tmp_path / "fast.safetensors")
    assert (tmp_path / "fast.safetensors").stat().st_size <= 2_000_000
    student = distill.Student()
    student.load_state_dict(state["ema"], strict=False)
    merged = load_transformer_share(
        Checkpoint(POCKET_WEIGHTS), "transformer", range(6), dtype=torch.float32, device=torch.device("cpu"),
        loras=find_loras([str(tmp_path / "fast.safetensors")], 1),
    )  # fmt: skip
    for name, lora in student.loras.items():
        wanted = lora.weight + lora.up @ lora.down
        assert (merged.get_submodule(name).weight - wanted).abs().max() < 1e-3 * wanted.abs().max()
