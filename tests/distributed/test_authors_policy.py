"""The baseline "the authors' policy" of the benchmarks is run, not computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.authors_policy import measure_authors
from dualparal import Engine, GenerationRequest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_whole_video_comes_at_the_end(tiny: Path, ranks: int) -> None:
    request = GenerationRequest(
        prompt="x", negative_prompt="", latents_num=8, num_per_block=3, num_cat=2, num_inference_steps=2, height=32, width=32,
        seed=0, guidance_scale=5.0,
    )  # fmt: skip
    resolved = Engine(str(tiny), ranks=ranks, device="cpu").resolve(request)
    found = measure_authors(tiny, resolved, ranks)
    assert found["frames"] == 4 * 7 + 1
    assert 0 < found["decode"] < found["total"]
    assert found["memory"] > 100 * ranks, "every rank has its libraries, at least"
