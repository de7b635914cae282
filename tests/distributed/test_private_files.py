"""Whatever the umask: what an engine and its workers write is for this user only, while a job runs and afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dualparal import Engine, GenerationRequest
from dualparal.media.writer import thumbnail
from dualparal.presets import Preset

WAIT_S = 300
SMALL = Preset(height=32, width=32, num_per_block=3, num_cat=1, num_inference_steps=5, context="recomputed")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def too_open(*folders: Path) -> set[str]:
    """Files and folders under `folders`, themselves included, that others could read or enter."""
    found = set()
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            try:
                mode = stat.S_IMODE(path.lstat().st_mode)
            except FileNotFoundError:  # under a temporary name until now
                continue
            if mode & 0o077:
                found.add(f"{path.relative_to(folder.parent)} {mode:o}")
    return found


@pytest.mark.parametrize("mask", [0o022, 0])
def test_all_that_is_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    outputs, cache = tmp_path / "outputs", tmp_path / "cache"
    monkeypatch.setenv("DUALPARAL_CACHE", str(cache))
    hook = "tests.distributed.hooks:saves_often"
    seen: set[str] = set()
    with (
        umask(mask),
        Engine(tiny, preset=SMALL, device="cpu", threads=1, ranks=2, outputs=outputs, worker_hook=hook) as engine,
    ):
        job = engine.submit(GenerationRequest(prompt="a secret", latents_num=9, seed=1), export_images=True)
        was_saved = False
        for _ in job.events(WAIT_S):
            seen |= too_open(outputs, cache)
            was_saved = was_saved or (job.folder.path / "state" / "sweep.safetensors").exists()
        compared = engine.compare(GenerationRequest(prompt="a secret", latents_num=3, seed=1))
        compared.result(WAIT_S)
        thumbnail(job.folder.video, job.folder.path / "poster.jpg")
        seen |= too_open(outputs, cache)
    assert was_saved and (job.folder.path / "frames").is_dir() and any(cache.rglob("*.safetensors"))
    assert not seen
