"""Stop, counted in block steps, and while the prompt is still being encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualparal import Cancelled, Engine, GenerationRequest, JobCancelled, Started
from dualparal.presets import Preset
from tests.conftest import wait_until
from tests.distributed.hooks import ENCODER_IS_HELD, HELD_ITEM, HOLD_FOLDER, IS_HELD

WAIT_S = 600
SMALL = Preset(height=32, width=32, num_inference_steps=4, num_per_block=3, num_cat=2)
pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_ends_within_the_block_steps_under_way(
    ranks: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves_nothing: None
) -> None:
    monkeypatch.setenv(HOLD_FOLDER, str(tmp_path))

    def begun() -> list[int]:
        return [(tmp_path / f"begun on rank {rank}").stat().st_size for rank in range(ranks)]

    options: dict[str, Any] = {"ranks": ranks, "outputs": tmp_path / "outputs", "worker_hook": "tests.distributed.hooks:holds"}
    with Engine(tiny, preset=SMALL, device="cpu", threads=1, **options) as engine:
        # While the prompt is encoded: the job does not wait for it, and the engine goes on once the encoder is free.
        job = engine.submit(GenerationRequest(prompt=ENCODER_IS_HELD, latents_num=5))
        assert wait_until((tmp_path / "encoding").exists, WAIT_S)
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result(WAIT_S)
        final = list(job.events())[-1]
        assert isinstance(final, Cancelled) and (final.path, final.num_frames) == (None, 0)
        # In the middle of a block step.
        held = engine.submit(GenerationRequest(prompt="held", latents_num=40, num_inference_steps=IS_HELD))
        again = engine.resume(job.id)
        (tmp_path / "go").touch()
        assert wait_until((tmp_path / "held").exists, WAIT_S)
        before = begun()
        assert before[-1] == HELD_ITEM + 1
        held.cancel()
        with pytest.raises(JobCancelled):
            held.result(WAIT_S)
        further = [after - count for after, count in zip(begun(), before, strict=True)]
        assert max(further) <= 2 * ranks + 1, further
        num_items = next(event.num_items for event in held.events() if isinstance(event, Started))
        assert begun()[0] < num_items, "it ran to its end"
        assert again.result(WAIT_S).num_frames == 17
