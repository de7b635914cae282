"""What the page and the API tell of a job's history, and where they read it."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dualparal.events import BlockReady, Cancelled, Finished, Progress, Queued, Started
from dualparal.jobs.history import fold
from dualparal.ui import gallery, panels, words
from dualparal.ui.api import Calls
from dualparal.ui.studio import Studio
from dualparal.ui.watch import watch
from tests.fake_group import Make
from tests.page_server import GRADIO_WARNINGS, ON_PAGE
from tests.ui.test_parts import made

pytestmark = GRADIO_WARNINGS
DAY_S = 86_400.0


@pytest.fixture
def studio(make: Make) -> Studio:
    return Studio(make(**ON_PAGE).start())


def resumed() -> list[Any]:
    """A job of 5 s yesterday and 3 s today."""
    block = {"path": "block_0000.ts", "first_frame": 0, "num_frames": 5, "duration_s": 0.3}
    started = {"num_blocks": 2, "num_items": 4, "num_frames": 9}
    return [
        Queued(job_id="abcdef", time_s=0, position=3), Started(job_id="abcdef", time_s=600, worked_s=0.0, **started),
        BlockReady(job_id="abcdef", time_s=604, worked_s=4.0, block=0, **block),
        Cancelled(job_id="abcdef", time_s=605, worked_s=5.0), Queued(job_id="abcdef", time_s=DAY_S, worked_s=5.0, position=0),
        Started(job_id="abcdef", time_s=DAY_S + 1, worked_s=5.0, **started),
        Finished(job_id="abcdef", time_s=DAY_S + 4, worked_s=8.0, path="video.mp4", num_frames=9, timings={"total_s": 4.0}),
    ]  # fmt: skip


def test_made_in_counts_both_runs_and_no_waiting(studio: Studio) -> None:
    found = dataclasses.replace(made(studio), history=fold(resumed()))
    assert panels.headline(found, studio)[1].endswith("made in 8.0 s")
    assert "first frames after 4.0 s" in panels.board(found, studio)
    assert "made in 8.0 s" in gallery._card(found, "")


def test_first_frames_are_not_promised_once_they_are_there(studio: Studio) -> None:
    """A job resumed to its end comes by finished blocks, and decoding takes seconds in which no step is left."""
    progress = Progress(job_id="abcdef", items_done=4, num_items=4, num_steps=2, block_steps=(2, 2), eta_s=0.0)
    found = dataclasses.replace(made(studio), state="running", progress=progress, history=fold(resumed()[:-1]))
    assert "first frames after 4.0 s" in panels.board(found, studio)
    denoised = dataclasses.replace(found, history=fold(resumed()[:2]))
    assert "first frames" not in panels.board(denoised, studio)


def test_refusals_name_no_path_of_the_server() -> None:
    reported = (
        "/srv/data/outputs/abcdef/video.mp4 cannot be written: full; see https://example.org/a/b or /v1/videos, and/or 3/4"
    )
    assert words.without_paths(reported) == (
        "video.mp4 cannot be written: full; see https://example.org/a/b or /v1/videos, and/or 3/4"
    )


@pytest.fixture
def read_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the disk by the thread that runs the event loop."""
    found: list[str] = []
    loop = threading.get_ident()

    def noted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any = None, *rest: Any, **named: Any) -> Any:
            if threading.get_ident() == loop and "outputs" in str(path):
                found.append(f"{name} {path}")
            return real(path, *rest, **named)

        return call

    for name in ("stat", "scandir", "listdir", "link", "open"):
        monkeypatch.setattr(os, name, noted(getattr(os, name), name))
    monkeypatch.setattr(builtins, "open", noted(builtins.open, "open"))
    monkeypatch.setattr("io.open", noted(builtins.open, "open"))
    return found


async def _all(updates: AsyncIterator[Any]) -> int:
    return len([update async for update in updates])


def test_following_a_job_reads_no_disk_on_the_event_loop(studio: Studio, read_on_the_loop: list[str]) -> None:
    studio.outputs.exists()
    assert read_on_the_loop, "the watch on the disk works"
    read_on_the_loop.clear()
    calls = Calls(studio)
    fields = {"prompt": "a kite", "seconds": 2, "num_inference_steps": 2}
    assert asyncio.run(_all(calls.generate(None, None, "me", **fields))) >= 2  # type: ignore[arg-type]
    (job,) = studio.engine.dispatcher._jobs.values()
    assert asyncio.run(_all(watch(studio, job.id, job.owner, "", lambda: True))) == 1, "it has ended"
    assert not read_on_the_loop
