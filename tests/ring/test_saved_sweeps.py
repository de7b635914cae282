"""A job that goes on from any saved border gives the bits of one that was never interrupted (METHOD.md, invariant 6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualparal.method.borders import borders
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import ALL_BLOCKS, Rules, make_schedule
from dualparal.method.step_cache import StepCache
from dualparal.planning.disk import sweep_bytes
from dualparal.ring.saved_sweeps import StateWriter, SweepState, block_file, read_state, write_sweep
from dualparal.ring.tensor_files import write_tensors
from tests import settings as some
from tests.local_ring import denoise_in_threads

CASES = {
    "paper": Rules(),
    "paper, micro-batches": Rules(micro_batches=True),
    "preview": Rules(left_context="own_step", max_in_flight=3, stagger=2),
    "preview, one at a time": Rules(left_context="own_step", max_in_flight=1, stagger=1),
    "paper, step cache": Rules(step_cache=StepCache(interval=2, max_order=1, before=2)),
}


class KeepsAll:
    """A saver that keeps every border in memory."""

    def __init__(self) -> None:
        self.borders: list[SweepState] = []
        self.blocks: dict[int, torch.Tensor] = {}

    def wants_sweep(self) -> bool:
        return True

    def save_sweep(self, state: SweepState) -> None:
        self.borders.append(state)

    def save_block(self, block: int, latents: torch.Tensor) -> None:
        self.blocks[block] = latents


def texts() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(1, 6, 32, generator=generator) for _ in range(2)]]


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_border_gives_the_same_bits(name: str, experts: int, tiny: Path, tiny_two: Path, tmp_path: Path) -> None:
    job = {
        "latents_num": 15, "num_per_block": 3, "num_cat": 2, "steps": 5, "texts": texts(), "rules": CASES[name],
        "boundary_ratio": 0.875 if experts == 2 else None,
    }  # fmt: skip
    folder = tiny_two if experts == 2 else tiny
    kept = KeepsAll()
    whole = denoise_in_threads(folder, ranks=2, delay_seed=3, saver=kept, **job)
    assert len(kept.borders) > (3 if "step cache" in name else 5)
    held, said = max(held_bytes(border) for border in kept.borders), saved_bytes(CASES[name], experts)
    assert held == said if CASES[name].step_cache is None else held <= said, "what is saved and what the disk is asked for"
    for number, border in enumerate(kept.borders):
        write_sweep(tmp_path, border)
        assert (tmp_path / "sweep.safetensors").stat().st_size <= held_bytes(border) + 16_384, "a header lists the tensors"
        for block in range(border.num_finished):
            torch.testing.assert_close(kept.blocks[block], whole[block], rtol=0, atol=0)
        for block, latents in kept.blocks.items():
            writer = StateWriter(tmp_path)
            writer.save_block(block, latents)
            writer.close()
        state, finished = read_state(tmp_path)
        assert state is not None and len(finished) == border.num_finished
        rest = denoise_in_threads(folder, ranks=1 + number % 3, resume=state, **job)
        assert sorted(rest) == list(range(border.num_finished, len(whole)))
        assert all(torch.equal(rest[block], whole[block]) for block in rest)


def held_bytes(state: SweepState) -> int:
    """Of all tensors as large as latents."""
    in_samplers = [x for named in state.samplers.values() for x in named.values() if x.dim() > 0]
    return sum(x.nbytes for x in (*state.latents.values(), *in_samplers, *state.tails.values(), *state.heads.values()))


def saved_bytes(rules: Rules, experts: int) -> int:
    """What the disk is asked for, for this model's 4 channels in place of Wan's 16."""
    request = some.settings(latents_num=15, num_per_block=3, num_cat=2, num_inference_steps=5, height=32, width=32)
    policy = {name: getattr(rules, name) for name in ("left_context", "stagger", "micro_batches")}
    skips = {"cache_interval": rules.step_cache.interval, "disable_cache_before_step": 2} if rules.step_cache else {}
    boundary_ratio = 0.875 if experts == 2 else None
    return sweep_bytes(
        request.model_copy(
            update={**policy, **skips, "max_in_flight": min(rules.max_in_flight, 5), "boundary_ratio": boundary_ratio}
        )
    ) // 4  # fmt: skip


CACHED = {
    "paper": Rules(context="cached", refresh=2),
    "paper, micro-batches": Rules(context="cached", micro_batches=True, refresh=3),
    "paper, guidance in the middle": Rules(context="cached", guided_steps=(1, 4), refresh=2),
    "preview": Rules(left_context="own_step", max_in_flight=3, stagger=2, context="cached", refresh=3),
    "preview, one at a time": Rules(left_context="own_step", max_in_flight=1, context="cached", refresh=3),
    "paper, step cache": Rules(context="cached", step_cache=StepCache(interval=2, max_order=1, before=2), refresh=2),
    "preview, step cache": Rules(
        left_context="own_step", max_in_flight=3, stagger=2, context="cached", refresh=1, micro_batches=True,
        step_cache=StepCache(interval=2, max_order=1, before=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", CACHED)
def test_every_border_gives_the_same_bits_with_cached_context(
    name: str, experts: int, tiny: Path, tiny_two: Path, tmp_path: Path
) -> None:
    """The stages begin each resumed job with nothing in their caches."""
    job: dict[str, Any] = {
        "latents_num": 20, "num_per_block": 3, "num_cat": 2, "steps": 6, "texts": texts(), "rules": CACHED[name],
        "boundary_ratio": 0.875 if experts == 2 else None,
    }  # fmt: skip
    folder = tiny_two if experts == 2 else tiny
    kept = KeepsAll()
    whole = denoise_in_threads(folder, ranks=3, delay_seed=3, saver=kept, **job)
    assert len(kept.borders) >= 2
    assert any(border.num_finished for border in kept.borders), "no border in the middle of the job"
    for number, border in enumerate(kept.borders):
        state = written_and_read(border, kept.blocks, tmp_path / str(number))
        rest = denoise_in_threads(folder, ranks=1 + number % 3, delay_seed=number, resume=state, **job)
        assert sorted(rest) == list(range(border.num_finished, len(whole)))
        assert all(torch.equal(rest[block], whole[block]) for block in rest)


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_killed_anywhere(tiny: Path, tiny_two: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Stopped after any item, gone on from the last border, and stopped again."""
    has_two = data.draw(st.booleans())
    rules = Rules(
        context=data.draw(st.sampled_from(["cached", "cached", "recomputed"])),
        refresh=data.draw(st.integers(1, 4)),
        left_context=data.draw(st.sampled_from(["latest", "own_step"])),
        max_in_flight=data.draw(st.integers(1, 4) | st.just(ALL_BLOCKS)),
        stagger=data.draw(st.integers(1, 4)),
        micro_batches=data.draw(st.booleans()),
        guided_steps=data.draw(st.none() | st.tuples(st.integers(0, 3), st.integers(3, 6))),
        step_cache=data.draw(st.none() | st.builds(StepCache, interval=st.integers(2, 3), before=st.integers(1, 2))),
    )
    job: dict[str, Any] = {
        "latents_num": data.draw(st.integers(7, 16)), "num_per_block": 3, "num_cat": data.draw(st.integers(0, 3)), "steps": 6,
        "texts": texts(), "rules": rules, "boundary_ratio": 0.875 if has_two else None,
    }  # fmt: skip
    folder = tiny_two if has_two else tiny
    whole = denoise_in_threads(folder, **job)
    state: SweepState | None = None
    found: dict[int, torch.Tensor] = {}
    for number, stop_after in enumerate((*data.draw(st.lists(st.integers(1, 40), max_size=3)), None)):
        kept = KeepsAll()
        found |= denoise_in_threads(
            folder,
            ranks=1 + number % 3,
            resume=state,
            saver=kept,
            stop_after=stop_after,
            may_end=True,
            **job,
        )
        if kept.borders:
            state = written_and_read(kept.borders[-1], found, tmp_path_factory.mktemp("state"))
    assert sorted(found) == sorted(whole)
    assert all(torch.equal(found[block], whole[block]) for block in whole)


def written_and_read(border: SweepState, blocks: dict[int, torch.Tensor], folder: Path) -> SweepState:
    """What a later run finds on disk after `border`."""
    folder.mkdir(exist_ok=True)
    write_sweep(folder, border)
    for block in range(border.num_finished):
        write_tensors(block_file(folder, block), {"latents": blocks[block]}, {})
    state, finished = read_state(folder)
    assert state is not None and len(finished) == border.num_finished
    return state


def test_without_refresh_there_is_no_border_to_go_on_from() -> None:
    assert not list(borders(make_schedule(Rules(context="cached"), BlockPlan.of(40, 3, 2), (0,) * 6)))


def test_saving_keeps_to_its_share_with_the_next_save_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def slow_save(folder: Path, state: SweepState) -> None:
        nonlocal now
        now += 3.0

    monkeypatch.setattr("dualparal.ring.saved_sweeps.time.monotonic", lambda: now)
    monkeypatch.setattr("dualparal.ring.saved_sweeps.write_sweep", slow_save)
    writer = StateWriter(tmp_path / "state", max_share=0.02)
    assert not writer.wants_sweep(), "before there was any run to have a share of"
    saves = 0
    for now in range(100, 1100):
        if writer.wants_sweep():
            writer.save_sweep(SweepState(next_index=1, num_finished=0, latents={}, counts={}, samplers={}))
            while writer._is_busy:
                time.sleep(0.001)
            saves += 1
            assert saves == 1 or 3.0 * saves <= 0.02 * (now - 100)
    assert saves == 6  # after 2 s, then whenever 50 times the next total has passed: 300, 450, 600, 750 and 900 s
    writer.close()


def flip(content: bytes, at: float) -> bytes:
    place = int(at * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, float], bytes]] = {
    "a flipped bit": flip,
    "cut short": lambda content, at: content[: int(at * len(content))],
    "zeros": lambda content, at: content[: int(at * len(content))] + bytes(len(content) - int(at * len(content))),
    "too long": lambda content, at: content + b"\0" * (1 + int(at * 100)),
    "another file": lambda content, at: b"\x08\0\0\0\0\0\0\0{}      ",
}


def a_saved_job(folder: Path, job: int = 0) -> tuple[Path, SweepState, SweepState]:
    """(folder, newest border, the one before) with three finished blocks, two of which the older border builds on."""

    def some(number: int) -> torch.Tensor:
        return torch.randn(1, 2, 3, 2, 2, generator=torch.Generator().manual_seed(100 * job + number))

    state = folder / f"job{job}" / "state"
    state.mkdir(parents=True)
    for block in range(3):
        write_tensors(block_file(state, block), {"latents": some(block)}, {})
    older, newer = (
        SweepState(index, finished, {3: some(index)}, {3: {"step": index}}, {3: {"x": some(index + 1)}}, sweep=index)
        for index, finished in ((7, 2), (9, 3))
    )
    write_sweep(state, older)
    write_sweep(state, newer)
    return state, newer, older


def is_read(state: Path) -> int:
    """`next_index` of the border that is read, whose content and blocks are as saved; 0 without one."""
    found, blocks = read_state(state)
    if found is None:
        assert not len(blocks)
        return 0
    assert len(blocks) == found.num_finished == found.next_index // 2 - 1
    expected = [torch.randn(1, 2, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n in (*range(3), found.next_index)]
    assert all(torch.equal(block, one) for block, one in zip(blocks, expected, strict=False))
    assert torch.equal(found.latents[3], expected[-1]) and found.counts == {3: {"step": found.next_index}}
    return found.next_index


@settings(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["sweep", "sweep_before", "latents_0000", "latents_0001", "latents_0002"]),
    kind=st.sampled_from([*DAMAGES, "missing", "a folder", "of another job", "swapped"]), at=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_damaged_files_are_never_taken_for_whole(
    name: str, kind: str, at: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    state, _, _ = a_saved_job(folder)
    assert is_read(state) == 9
    file = state / f"{name}.safetensors"
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif kind == "of another job":
        other, _, _ = a_saved_job(folder, job=1)
        file.write_bytes((other / file.name).read_bytes())
    elif kind == "swapped":
        partner = state / {"sweep": "sweep_before.safetensors"}.get(name, "latents_0001.safetensors")
        file.write_bytes(partner.read_bytes())
        partner.write_bytes(content)
        if partner == file:
            return
    else:
        file.write_bytes(DAMAGES[kind](content, at))
    if file.is_file() and file.read_bytes() == content:
        return
    expected = {"sweep": 7, "sweep_before": 9, "latents_0002": 7}.get(name, 0)
    if kind == "swapped":  # sweeps are whole, if not the newest; blocks are not what they should be
        expected = 7 if name == "sweep" else 0
    assert is_read(state) == expected


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    state, finished = read_state(tmp_path)
    assert state is None and not len(finished)


def test_a_full_disk_ends_the_saving_not_the_job(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    writer = StateWriter(tmp_path / "state")
    writer.save_block(0, torch.zeros(1))
    writer.close()
    assert not writer.wants_sweep()


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path / "state")
    writer.save_block(3, torch.ones(2))
    writer.close()
    assert [file.name for file in (tmp_path / "state").iterdir()] == [block_file(tmp_path, 3).name]
