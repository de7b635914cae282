"""A job that goes on from any saved border gives the bits of one that was never interrupted (METHOD.md, invariant 6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualparal.core.schedule import Rules
from dualparal.errors import OutputError
from dualparal.runtime.state import StateWriter, SweepState, block_file, read_state, write_sweep
from tests.local_ring import denoise_in_threads

CASES = {
    "paper": Rules(),
    "paper, micro-batches": Rules(micro_batches=True),
    "preview": Rules(policy="preview", max_in_flight=3, stagger=2),
    "preview, one at a time": Rules(policy="preview", max_in_flight=1, stagger=1),
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
    assert len(kept.borders) > 5
    for number, border in enumerate(kept.borders):
        write_sweep(tmp_path, border)
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
