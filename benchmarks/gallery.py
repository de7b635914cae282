"""What a gallery costs the page: the server's part of the first paint and /status, with few videos in it and with many.

Both in this process, over folders as finished jobs leave them, by turns. "cold" is the first visitor after a start, for whom
every record is read to know whose it is; "warm" everybody after. The page's parts that know of no video are not in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from benchmarks.common import hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.events import BlockReady, Finished, Queued, Started
from dualparal.jobs.folder import JobFolder, list_jobs, new_job_id
from dualparal.presets import complete, load_presets
from dualparal.ui.api import Calls
from dualparal.ui.owners import owner_of
from dualparal.ui.page import Page
from dualparal.ui.studio import Studio

TOKEN = "a visitor's own secret"
VISITOR: Any = SimpleNamespace(username=None, client=None, session_hash="tab", headers={})


def fill(outputs: Path, count: int) -> None:
    """`count` finished videos of one visitor; their mp4s are empty, for nobody plays them here."""
    preset = load_presets()["pocket"]
    poster = Image.new("RGB", (64, 64))
    for number in range(count):
        settings = complete(GenerationRequest(prompt=f"a kite, number {number}", seed=number), preset)
        folder = JobFolder.create(outputs, job_id := new_job_id(), settings, owner=owner_of(TOKEN), model="pocket")
        folder.append(Queued(job_id=job_id, position=0))
        folder.append(Started(job_id=job_id, num_blocks=1, num_items=20, num_frames=settings.num_frames))
        path, num_frames = str(folder.path / "block_0000.ts"), settings.num_frames
        folder.append(BlockReady(job_id=job_id, block=0, path=path, first_frame=0, num_frames=num_frames, duration_s=4.0))
        folder.append(Finished(job_id=job_id, path=str(folder.video), num_frames=settings.num_frames, timings={"total_s": 9.0}))
        folder.video.touch()
        poster.save(folder.path / "poster.jpg")


def timed(work: Callable[[], Any]) -> float:
    """Of this process's processor time, which other work on the machine does not lengthen."""
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def visit(engine: Engine, times: int) -> dict[str, list[float]]:
    """Processor seconds of the opening event, after a start and then, and of /status of each of the newest videos in turn."""
    studio = Studio(engine)
    page, calls = Page(studio), Calls(studio)
    newest = [folder.job_id for folder in list_jobs(engine.outputs)][:5]
    found = {"cold": [timed(lambda: page._open(TOKEN, "", "", VISITOR))], "warm": [], "status": []}
    for turn in range(times):
        found["warm"].append(timed(lambda: page._open(TOKEN, "", "", VISITOR)))
        job_id = newest[turn % len(newest)]
        found["status"].append(timed(lambda job_id=job_id: calls.status(VISITOR, job_id, TOKEN)))  # type: ignore[misc]
    return found


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    flags.add_argument("--videos", nargs=2, type=int, default=[5, 500], metavar="N", help="so many, and so many")
    flags.add_argument("--turns", type=int, default=12)
    asked = flags.parse_args()
    print(hardware())
    found: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        engines = {count: Engine("pocket", device="cpu", outputs=Path(folder) / str(count)) for count in asked.videos}
        for count, engine in engines.items():
            fill(engine.outputs, count)
        for _ in range(asked.turns):
            for count, engine in engines.items():
                for name, seconds in visit(engine, 3).items():
                    found.setdefault(count, {}).setdefault(name, []).extend(seconds)
    few, many = (found[count] for count in asked.videos)
    words = {"cold": "first paint, first visitor after a start", "warm": "first paint", "status": "/status"}
    rows = []
    for name, label in words.items():
        medians_ms = [statistics.median(side[name]) * 1e3 for side in (few, many)]
        rows.append([label, *(f"{ms:.1f}" for ms in medians_ms), f"{medians_ms[1] / medians_ms[0]:.2f}"])
    print(table(["", *(f"{count} videos, ms" for count in asked.videos), "ratio"], rows))


if __name__ == "__main__":
    main()
