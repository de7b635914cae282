"""A page over fake workers on a free port, and what Gradio's own code needs excused where warnings are errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client

from dualparal.engine.engine import Engine
from dualparal.presets import Limits, Preset
from dualparal.ui.http.sites import Sites
from dualparal.ui.serve import launch
from dualparal.ui.studio import Studio
from tests.fake_group import fake_groups

DEADLINE_S = 120
PAGE_PRESET = Preset(
    schedule="paper", context="recomputed",
    name="pocket", title="Pocket Wan · 96×96", model="pocket", hardware="any CPU", dtype="float32", seconds=4.0,
    height=96, width=96, num_inference_steps=12, guidance_scale=4.0, flow_shift=3.0, num_per_block=4, num_cat=2,
    examples=("a red circle bouncing on a navy background", "two green squares drifting apart on sand"),
    limits=Limits(seconds=120, num_inference_steps=60, num_per_block=32, pixels=512 * 512),
)  # fmt: skip
ON_PAGE: dict[str, Any] = {"model": "pocket", "preset": PAGE_PRESET, "ranks": 2, "device": "cpu", "threads": 1}
GRADIO_WARNINGS = [
    # gradio_client leaves its event stream's socket to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # gradio's queue statistics use what pandas 3 has deprecated
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


class Server:
    """A page on a free port with a client of its own; `groups` steers the engine's workers, and `options` are the engine's."""

    def __init__(
        self, outputs: Path, auth: list[tuple[str, str]] | None = None, sites: Sites | None = None, *,
        item_s: float = 0.02, can_load: bool = True, keys: tuple[str, ...] = (), port: int | None = None,
        has_tools: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        self._life = contextlib.ExitStack()
        self.groups = self._life.enter_context(fake_groups(self._life.enter_context(pytest.MonkeyPatch.context())))
        self.groups.item_s = item_s
        if not can_load:
            self.groups.can_load.clear()
        self.engine = Engine(**{**ON_PAGE, "outputs": outputs, **options}).start(wait=False)
        self.studio = Studio(self.engine)
        made: Any = launch(self.studio, quiet=True, auth=auth, sites=sites, keys=keys, port=port, has_tools=has_tools)
        self.page: gr.Blocks = made
        self.url = str(self.page.local_url)
        self.client = self.new_client(auth=auth[0] if auth else None)

    def new_client(self, **options: Any) -> Client:
        return Client(self.url, verbose=False, httpx_kwargs={"timeout": DEADLINE_S}, **options)  # it waits 5 s by itself

    def close(self) -> None:
        self.client.close()
        self.page.close(verbose=False)
        self.engine.close()
        self._life.close()
        del self.page, self.client
        tidy_up()

    def wait(self, job_id: str, done: Callable[[dict[str, Any]], bool], **more: Any) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            status = self.client.predict(job_id=job_id, api_name="/status", **more)
            if done(status):
                return status
            time.sleep(0.1)
        raise AssertionError(f"job {job_id} did not get there: {status}")


def tidy_up() -> None:
    """Close the event loops and sockets that gradio and its client leave to the collector, before another test pays for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(RuntimeError):  # there is none
            loop = asyncio.get_event_loop_policy().get_event_loop()  # gradio makes one per Blocks and sets it, unused
            if not loop.is_running():
                loop.close()
                asyncio.set_event_loop(None)
        gc.collect()
