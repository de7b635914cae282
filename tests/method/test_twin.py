"""Many blocks equal the slow single-process statement of METHOD.md (tests/twin.py) within 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualparal.method.schedule import ALL_BLOCKS, Rules
from dualparal.method.step_cache import StepCache
from dualparal.request import SolverName
from tests.local_ring import denoise_in_threads
from tests.texts import as_said, joined, some_texts
from tests.twin import Twin, block_lengths

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def twin_of() -> Callable[[Path], Twin]:
    kept: dict[Path, Twin] = {}

    def find(folder: Path) -> Twin:
        if folder not in kept:
            kept[folder] = Twin(folder)
        return kept[folder]

    return find


def check(twin: Twin, ranks: int = 1, rules: Rules | None = None, **case: Any) -> torch.Tensor:
    rules = rules or Rules()
    expected = joined(twin.run(**case, **as_said(rules)))
    found = joined(denoise_in_threads(twin.folder, ranks=ranks, rules=rules, **case))
    assert found.shape == expected.shape
    assert found.shape[2] == case["latents_num"]
    assert 0.3 < expected.std() < 3, "the tiny model no longer keeps latents of order 1"
    worst = (found - expected).abs().max().item()
    assert worst <= TOLERANCE, f"off by {worst}"
    return found


# latents_num, num_per_block, num_cat: blocks
PLANS = [
    (1, 3, 0),  # one frame
    (5, 3, 2),  # exactly one block
    (6, 3, 2),  # a last block of one frame, shorter than num_cat
    (7, 4, 0),  # no context, a short last block
    (8, 4, 0),
    (9, 3, 3),  # num_cat = num_per_block
    (10, 3, 3),  # ... and a last block of one frame
    (11, 3, 2),  # whole blocks
    (13, 1, 1),  # many blocks of one frame
    (14, 4, 1),  # a last block longer than num_cat
    (24, 2, 1),  # many blocks: more than steps
]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("latents_num", "num_per_block", "num_cat"), PLANS)
def test_one_expert(
    tiny: Path, twin_of: Callable[[Path], Twin], latents_num: int, num_per_block: int, num_cat: int, guidance: float
) -> None:
    check(
        twin_of(tiny), latents_num=latents_num, num_per_block=num_per_block, num_cat=num_cat, steps=5,
        texts=some_texts(guided=guidance > 1), guidance=(guidance, guidance), seed=latents_num,
    )  # fmt: skip


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (5.0, 3.0)])
@pytest.mark.parametrize(("latents_num", "num_per_block", "num_cat"), PLANS)
def test_two_experts(
    tiny_two: Path,
    twin_of: Callable[[Path], Twin],
    latents_num: int,
    num_per_block: int,
    num_cat: int,
    guidance: tuple[float, float],
) -> None:
    check(
        twin_of(tiny_two), latents_num=latents_num, num_per_block=num_per_block, num_cat=num_cat, steps=6,
        texts=some_texts(guided=guidance[0] > 1), guidance=guidance, boundary_ratio=0.8, seed=latents_num,
    )  # fmt: skip


@pytest.mark.parametrize("boundary_ratio", [0.0, 0.3, 0.875, 1.0])
def test_the_switch_of_experts_anywhere(tiny_two: Path, twin_of: Callable[[Path], Twin], boundary_ratio: float) -> None:
    check(
        twin_of(tiny_two), ranks=2, latents_num=12, num_per_block=3, num_cat=2, steps=8, texts=some_texts(),
        guidance=(5.0, 3.0), boundary_ratio=boundary_ratio, flow_shift=5.0,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [(7, 7), (9, 4), (1, 12)])
def test_texts_of_different_lengths(tiny: Path, twin_of: Callable[[Path], Twin], lengths: tuple[int, int]) -> None:
    check(twin_of(tiny), latents_num=8, num_per_block=3, num_cat=2, steps=4, texts=some_texts(lengths=lengths))


def test_a_text_per_block(tiny_two: Path, twin_of: Callable[[Path], Twin]) -> None:
    case: dict[str, Any] = dict(
        latents_num=12, num_per_block=3, num_cat=1, steps=5, texts=some_texts(3, lengths=(6, 9)), boundary_ratio=0.8
    )
    found = check(twin_of(tiny_two), ranks=3, text_of_block=[0, 2, 1, 2], **case)
    other = joined(denoise_in_threads(tiny_two, text_of_block=[0, 2, 1, 1], **case))
    assert (found - other)[:, :, -2:].abs().max() > 0.01, "the last block does not listen to its own text"


@pytest.mark.parametrize("rules", [Rules(), Rules(context="cached", max_in_flight=3, stagger=2, left_context="own_step")])
def test_a_model_with_timesteps_of_its_tokens_own(tiny_ti2v: Path, twin_of: Callable[[Path], Twin], rules: Rules) -> None:
    case: dict[str, Any] = dict(
        latents_num=12, num_per_block=3, num_cat=2, steps=6, texts=some_texts(), size=(4, 6), rules=rules
    )
    found = [check(twin_of(tiny_ti2v), ranks=ranks, **case) for ranks in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


GHOSTS = {
    "paper": Rules(),
    "preview": Rules(max_in_flight=3, stagger=2, left_context="own_step"),
    "cached": Rules(context="cached", refresh=3, micro_batches=True),
    "steps skipped": Rules(step_cache=StepCache(interval=2, max_order=1, before=1)),
}


@pytest.mark.parametrize(
    ("rules", "solver"),
    [*((rules, "unipc") for rules in GHOSTS.values()), (GHOSTS["paper"], "euler"), (GHOSTS["paper"], "dpm++")],
)
def test_a_ghost_before_the_first_block(
    tiny_two: Path, twin_of: Callable[[Path], Twin], rules: Rules, solver: SolverName
) -> None:
    ghost = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    case: dict[str, Any] = dict(
        latents_num=8, num_per_block=3, num_cat=2, steps=5, texts=some_texts(), boundary_ratio=0.8, seed=9, solver=solver,
        rules=rules,
    )  # fmt: skip
    found = [check(twin_of(tiny_two), ranks=ranks, ghost=ghost, **case) for ranks in (1, 3)]
    assert torch.equal(*found)
    other = joined(denoise_in_threads(tiny_two, ghost=ghost + 1, **case))
    assert (found[0] - other)[:, :, :3].abs().max() > 0.01, "the first block does not see the ghost"


@pytest.mark.parametrize("rules", GHOSTS.values(), ids=GHOSTS)
def test_a_clean_picture_before_the_first_block(tiny_ti2v: Path, twin_of: Callable[[Path], Twin], rules: Rules) -> None:
    """At timestep 0 in every step, and in block 0 only."""
    ghost = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    case: dict[str, Any] = dict(latents_num=8, num_per_block=3, num_cat=2, steps=5, texts=some_texts(), seed=9)
    expected = joined(twin_of(tiny_ti2v).run(**case, **as_said(rules), ghost=ghost, is_ghost_clean=True))
    found = [joined(denoise_in_threads(tiny_ti2v, ranks=n, rules=rules, ghost=ghost, **case)) for n in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0] - expected).abs().max() <= TOLERANCE
    noisy = joined(twin_of(tiny_ti2v).run(**case, **as_said(rules), ghost=ghost))
    assert (found[0] - noisy)[:, :, :3].abs().max() > 0.01, "the picture is seen as noisy as the block"


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_numbers_of_steps(tiny: Path, twin_of: Callable[[Path], Twin], steps: int) -> None:
    check(twin_of(tiny), latents_num=7, num_per_block=3, num_cat=2, steps=steps, texts=some_texts())


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (2, 10)])
def test_pictures_that_are_not_square(tiny: Path, twin_of: Callable[[Path], Twin], size: tuple[int, int]) -> None:
    check(twin_of(tiny), latents_num=7, num_per_block=3, num_cat=2, steps=4, size=size, texts=some_texts())


@settings(max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything(tiny: Path, tiny_two: Path, twin_of: Callable[[Path], Twin], data: st.DataObject) -> None:
    num_per_block = data.draw(st.integers(1, 4))
    num_cat = data.draw(st.integers(0, num_per_block))
    latents_num = data.draw(st.integers(1, 14))
    num_blocks = len(block_lengths(latents_num, num_per_block, num_cat))
    num_texts = data.draw(st.integers(1, 2))
    is_guided = data.draw(st.booleans())
    has_two = data.draw(st.booleans())
    check(
        twin_of(tiny_two if has_two else tiny),
        ranks=data.draw(st.integers(1, 3)),
        latents_num=latents_num,
        num_per_block=num_per_block,
        num_cat=num_cat,
        steps=data.draw(st.integers(1, 7)),
        texts=some_texts(num_texts, guided=is_guided, lengths=(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))),
        text_of_block=data.draw(st.lists(st.integers(0, num_texts - 1), min_size=num_blocks, max_size=num_blocks)),
        guidance=(data.draw(st.sampled_from([2.0, 5.0])), data.draw(st.sampled_from([0.5, 4.0]))),
        boundary_ratio=data.draw(st.floats(0, 1)) if has_two else None,
        flow_shift=data.draw(st.sampled_from([1.0, 3.0, 12.0])),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        size=data.draw(st.sampled_from([(2, 2), (4, 4), (2, 6)])),
        rules=Rules(
            left_context=data.draw(st.sampled_from(["latest", "own_step"])),
            context=data.draw(st.sampled_from(["recomputed", "cached"])),
            max_in_flight=data.draw(st.integers(1, 4) | st.just(ALL_BLOCKS)),
            stagger=data.draw(st.integers(1, 5)),
            micro_batches=is_guided and data.draw(st.booleans()),
            refresh=data.draw(st.integers(0, 4)),
            guided_steps=data.draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 7))) if is_guided else None,
        ),
    )


def test_the_tiny_model_feels_everything(tiny: Path) -> None:
    """Otherwise the comparisons above would prove little: text, guidance, neighbours and their order all show."""
    case: dict[str, Any] = dict(latents_num=9, num_per_block=3, num_cat=2, steps=6, texts=some_texts())
    base = joined(denoise_in_threads(tiny, **case))
    changed = {
        "text": {"texts": some_texts(seed=12)},
        "guidance": {"guidance": (2.0, 2.0)},
        "time": {"flow_shift": 5.0},
        "noise": {"seed": 1},
    }
    for name, change in changed.items():
        other = joined(denoise_in_threads(tiny, **{**case, **change}))
        assert (base - other).abs().max() > 0.01, name
    # Neighbours: other noise in the last block changes the block before it (right) and in the first the second (left).
    lengths = [5, 3, 1]
    noise = [torch.randn(1, 4, n, 4, 4, generator=torch.Generator().manual_seed(n)) for n in lengths]
    before = denoise_in_threads(tiny, noise=noise, **case)
    for touched, felt in ((2, 1), (0, 1), (2, 0)):
        moved = [block + 1.0 * (number == touched) for number, block in enumerate(noise)]
        after = denoise_in_threads(tiny, noise=moved, **case)
        assert (before[felt] - after[felt]).abs().max() > 1e-3, f"block {felt} does not feel block {touched}"
