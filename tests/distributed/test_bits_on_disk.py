"""Flipped bits, cuts, zeros, swaps, missing files, over all files of a job that was cut off and of one that has finished: never
other bits without a word.

40 damages, always the same ones. `DUALPARAL_DAMAGES=1000` does so many.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dualparal import DualParalError, Engine, GenerationRequest, WorkerDied
from dualparal.files import STATE_FOLDER
from dualparal.jobs.facts import all_facts
from dualparal.jobs.folder import JobFolder
from dualparal.presets import Preset
from dualparal.ring.saved_sweeps import SWEEP_BEFORE, read_state
from dualparal.ui import snapshot
from tests.conftest import wait_until

NUM_DAMAGES = int(os.environ.get("DUALPARAL_DAMAGES", "40"))
WAIT_S = 300
SMALL = Preset(height=32, width=32, num_per_block=3, num_cat=1, num_inference_steps=5, schedule="paper", context="recomputed")
REQUEST = GenerationRequest(prompt="goes on", latents_num=12, seed=3)
KINDS = ("flip", "flip", "flip", "cut", "zeros", "missing", "swapped", "a folder")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 10 * NUM_DAMAGES)]


@dataclass(frozen=True)
class Jobs:
    """One job as it was cut off, and as it is once it has gone on and finished; `engine` works on a copy in its outputs."""

    cut_off: Path
    finished: Path
    engine: Engine

    def damaged(self, pristine: Path, chance: random.Random) -> tuple[JobFolder, Path, str]:
        """A fresh copy of `pristine` with one damage: (folder, the damaged file, the kind)."""
        folder = JobFolder(self.engine.outputs / pristine.name)
        self.engine.forget(folder.job_id)
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.copytree(pristine, folder.path)
        files = sorted(path for path in folder.path.rglob("*") if path.is_file() and path.stat().st_size)
        path, kind = chance.choice(files), chance.choice(KINDS)
        data = bytearray(path.read_bytes())
        place = chance.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "zeros":
            data[place : place + 512] = bytes(len(data[place : place + 512]))
        elif kind == "swapped":
            other = chance.choice([one for one in files if one.suffix == path.suffix])
            data, _ = bytearray(other.read_bytes()), other.write_bytes(data)
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind != "missing":
            path.write_bytes(data)
        return folder, path.relative_to(folder.path), kind


@pytest.fixture(scope="module")
def jobs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    where = tmp_path_factory.mktemp("bits")
    options = {"preset": SMALL, "device": "cpu", "threads": 1}
    with Engine(tiny, outputs=where / "cut", worker_hook="tests.distributed.hooks:saves_often", **options) as engine:  # type: ignore[arg-type]
        job = engine.submit(REQUEST)
        state = job.folder.path / STATE_FOLDER

        def is_far_enough() -> bool:
            found, finished = read_state(state)
            return found is not None and len(finished) >= 1 and (state / SWEEP_BEFORE).exists() and bool(job.view().blocks)

        assert wait_until(is_far_enough, WAIT_S), "no sweep was saved after the first block"
        os.kill(int(engine.workers["rank 0"]["pid"]), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(WAIT_S)
    cut_off = job.folder.path
    with Engine(tiny, outputs=where / "again", **options) as engine:  # type: ignore[arg-type]
        shutil.copytree(cut_off, engine.outputs / cut_off.name)
        engine.resume(cut_off.name).result(WAIT_S)
        finished = Path(shutil.copytree(engine.outputs / cut_off.name, where / "finished" / cut_off.name))
        yield Jobs(cut_off, finished, engine)


def bits(folder: Path, without: str = "") -> dict[str, bytes]:
    paths = (folder / "video.mp4", *sorted(folder.glob("block_*.ts")))
    return {path.name: path.read_bytes() for path in paths if path.name != without}


def test_a_job_that_was_cut_off(jobs: Jobs) -> None:
    """It gives the bits that it would have given, or says why not; whatever can be made again is."""
    chance, expected, outcomes = random.Random(1), bits(jobs.finished), Counter[str]()
    assert len(expected) == 5
    for _ in range(NUM_DAMAGES // 2):
        folder, path, kind = jobs.damaged(jobs.cut_off, chance)
        list(all_facts(jobs.engine.outputs))
        try:
            jobs.engine.resume(folder.job_id).result(WAIT_S)
        except DualParalError as error:
            assert "\n" not in str(error)
            is_ours = path.name in ("request.json", "events.jsonl") or kind == "a folder"
            is_ours = is_ours or (kind == "swapped" and path.suffix == ".json")  # with request.json
            assert is_ours, f"{path}, {kind}: could have been made again: {error}"
            outcomes["told"] += 1
        else:
            assert bits(folder.path) == expected, f"{path}, {kind}: other bits without a word"
            outcomes["the same bits"] += 1
    print(dict(outcomes))
    assert outcomes["the same bits"] > NUM_DAMAGES // 8


def test_a_job_that_has_finished(jobs: Jobs) -> None:
    """Its page, its facts, and what becomes of it when it is resumed. A finished video is not read again to be shown."""
    chance, expected = random.Random(2), bits(jobs.finished)
    for _ in range(NUM_DAMAGES // 2):
        folder, path, kind = jobs.damaged(jobs.finished, chance)
        list(all_facts(jobs.engine.outputs))
        try:
            found = snapshot.of_folder(folder)
            assert found.spans is not None and found.request == JobFolder(jobs.finished).request()
            jobs.engine.resume(folder.job_id).result(WAIT_S)
        except DualParalError as error:
            assert "\n" not in str(error)
            if path.name == "video.mp4" or (kind == "swapped" and path.suffix == ".ts"):
                continue
            now = bits(folder.path, without=path.name)  # which may be a folder now
            assert all(expected[name] == data for name, data in now.items()), f"{path}, {kind}"
        else:
            assert bits(folder.path) == expected, f"{path}, {kind}: other bits without a word"
