"""A job that goes on from any saved border gives the bits of one that was never interrupted (METHOD.md, invariant 6)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dualparal.core.schedule import Rules
from dualparal.core.step_cache import StepCache
from dualparal.errors import OutputError
from dualparal.model.layout import Checkpoint, split_layers
from dualparal.model.stage import Stage, Tails
from dualparal.request import GenerationRequest
from dualparal.runtime.kept_caches import is_complete, read_caches, write_caches
from dualparal.runtime.state import StageShare, StateWriter, SweepState, block_file, read_state, write_sweep
from dualparal.runtime.storage import sweep_bytes
from dualparal.runtime.tensor_files import write_tensors
from tests.local_ring import denoise_in_threads

CASES = {
    "paper": Rules(),
    "paper, micro-batches": Rules(micro_batches=True),
    "preview": Rules(policy="preview", max_in_flight=3, stagger=2),
    "preview, one at a time": Rules(policy="preview", max_in_flight=1, stagger=1),
    "paper, step cache": Rules(step_cache=StepCache(interval=2, max_order=1, before=2)),
}


class KeepsAll:
    """A saver that keeps every border in memory."""

    def __init__(self, keeps_caches: bool = False) -> None:
        self.borders: list[SweepState] = []
        self.blocks: dict[int, torch.Tensor] = {}
        self.keeps_caches = keeps_caches
        self.caches: dict[tuple[int, int], tuple[Tails, range]] = {}  # (sweep, rank) -> what that stage held

    def wants_sweep(self, cache_bytes: int) -> bool:
        return True

    def save_caches(self, stage: Stage, rank: int, sweep: int, tails: Tails) -> None:
        self.caches[sweep, rank] = (tails, stage.layers)

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
    most = sweep_bytes(_request(CASES[name]))
    for number, border in enumerate(kept.borders):
        write_sweep(tmp_path, border)
        # The disk is asked for Wan's 16 channels, this model has 4; a header lists the tensors.
        assert (tmp_path / "sweep.safetensors").stat().st_size <= most // 4 + 16_384, "more than the disk was asked for"
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


def _request(rules: Rules) -> GenerationRequest:
    return GenerationRequest(
        prompt="", latents_num=15, num_per_block=3, num_cat=2, num_inference_steps=5, height=32, width=32,
        schedule=rules.policy, max_in_flight=rules.max_in_flight, stagger=rules.stagger,
        cache_interval=rules.step_cache.interval if rules.step_cache else None, cache_order=1,
    )  # fmt: skip


CACHED = {
    "paper": Rules(context="cached"),
    "paper, micro-batches": Rules(context="cached", micro_batches=True),
    "preview": Rules(policy="preview", max_in_flight=3, stagger=2, context="cached"),
    "paper, step cache": Rules(context="cached", step_cache=StepCache(interval=2, max_order=1, before=2)),
}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", CACHED)
def test_every_border_gives_the_same_bits_with_cached_context(
    name: str, experts: int, tiny: Path, tiny_two: Path, tmp_path: Path
) -> None:
    job = {
        "latents_num": 15, "num_per_block": 3, "num_cat": 2, "steps": 5, "texts": texts(), "rules": CACHED[name],
        "boundary_ratio": 0.875 if experts == 2 else None,
    }  # fmt: skip
    folder = tiny_two if experts == 2 else tiny
    num_layers = Checkpoint(folder).num_layers
    kept = KeepsAll(keeps_caches=True)
    whole = denoise_in_threads(folder, ranks=3, delay_seed=3, saver=kept, save_caches=kept.save_caches, **job)
    first = split_layers(num_layers, 3, None)[0]
    assert len(kept.borders) > (3 if "step cache" in name else 5)
    assert any(border.caches for border in kept.borders), "no stage held anything at any border"
    for number, border in enumerate(kept.borders):
        at = tmp_path / str(number)
        at.mkdir()
        write_sweep(at, border, StageShare(first, num_layers))
        for block in range(border.num_finished):
            write_tensors(block_file(at, block), {"latents": kept.blocks[block]}, {})
        assert read_state(at, num_layers) == (None, []), "a border without the other ranks' K/V counted"
        for rank in (1, 2):
            write_caches(at, border.sweep, kept.caches[border.sweep, rank][0], rank, kept.caches[border.sweep, rank][1])
        state, finished = read_state(at, num_layers)
        assert state is not None and len(finished) == border.num_finished
        rest = denoise_in_threads(folder, ranks=1 + number % 3, delay_seed=number, resume=state, caches=at, **job)
        assert sorted(rest) == list(range(border.num_finished, len(whole)))
        assert all(torch.equal(rest[block], whole[block]) for block in rest)


def test_the_border_before_stays_until_all_ranks_have_written_the_new_one(tmp_path: Path) -> None:
    def border(sweep: int) -> None:
        state = SweepState(next_index=sweep, num_finished=0, latents={}, counts={}, samplers={}, sweep=sweep)
        write_sweep(tmp_path, state, StageShare(range(1), 2))

    def newest() -> int | None:
        state, _ = read_state(tmp_path, 2)
        return None if state is None else state.sweep

    border(3)
    assert newest() is None
    write_caches(tmp_path, 3, {}, 1, range(1, 2))
    assert newest() == 3
    border(5)
    assert newest() == 3
    write_caches(tmp_path, 5, {}, 1, range(1, 2))
    assert newest() == 5
    border(9)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "caches_000005_0.safetensors", "caches_000005_1.safetensors", "caches_000009_0.safetensors",
        "sweep_000005.safetensors", "sweep_000009.safetensors",
    ]  # fmt: skip
    assert newest() == 5


@pytest.mark.parametrize("is_cache_offloaded", [False, True])
def test_caches_are_gathered_only_for_a_border_that_is_saved(
    is_cache_offloaded: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bringing gigabytes together at every border to throw them away would cost more than the work."""
    asked: list[int] = []

    class Refuses(KeepsAll):
        def wants_sweep(self, cache_bytes: int) -> bool:
            asked.append(cache_bytes)
            return False

    def tails(stage: Stage) -> Tails:
        raise AssertionError("nobody wanted them")

    monkeypatch.setattr(Stage, "tails", tails)
    denoise_in_threads(
        tiny, latents_num=9, num_per_block=3, num_cat=2, steps=4, texts=texts(), rules=CACHED["paper"], ranks=2,
        saver=Refuses(keeps_caches=True), is_cache_offloaded=is_cache_offloaded,
    )  # fmt: skip
    assert len(asked) > 3 and max(asked) > 0


def test_no_border_is_saved_while_another_rank_lacks_the_one_before_or_caches_are_too_large(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualparal.runtime.state.MIN_INTERVAL_S", 0.0)
    writer = StateWriter(tmp_path / "state", max_share=1e9, share=StageShare(range(1), 2))
    tails: Tails = {(0, None): {0: (torch.zeros(8), torch.zeros(8))}}
    assert writer.wants_sweep(64)
    writer.save_sweep(SweepState(next_index=1, num_finished=0, latents={}, counts={}, samplers={}, sweep=0, caches=tails))
    while writer._is_busy:
        time.sleep(0.01)
    assert not writer.wants_sweep(64)
    write_caches(tmp_path / "state", 0, {}, 1, range(1, 2))
    assert writer.wants_sweep(64)
    monkeypatch.setattr("dualparal.runtime.state.MAX_BYTES", 2 * 64 - 1)  # two layers, 64 bytes of K and V each
    assert not writer.wants_sweep(64)
    assert "run again" in caplog.text
    writer.close()


def test_saving_keeps_to_its_share_with_the_next_save_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def slow_save(folder: Path, state: SweepState, share: StageShare | None) -> None:
        nonlocal now
        now += 3.0

    monkeypatch.setattr("dualparal.runtime.state.time.monotonic", lambda: now)
    monkeypatch.setattr("dualparal.runtime.state.write_sweep", slow_save)
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


def test_damaged_caches_are_one_clear_error(tmp_path: Path) -> None:
    write_caches(tmp_path, 1, {(0, None): {0: (torch.zeros(8), torch.zeros(8))}}, 0, range(1))
    assert list(read_caches(tmp_path, 1, range(1))) == [(0, None)]
    assert read_caches(tmp_path, 1, range(1, 2)) == {}
    (tmp_path / "caches_000001_0.safetensors").write_bytes(b"no")
    assert not is_complete(tmp_path, 1, 1)
    with pytest.raises(OutputError, match="damaged"):
        read_caches(tmp_path, 1, range(1))


def test_a_damaged_state_is_one_clear_error(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (None, [])
    (tmp_path / "sweep.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(OutputError, match="damaged"):
        read_state(tmp_path)


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
