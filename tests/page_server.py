"""A page in front of a fake engine on a free port, and what Gradio's own code needs excused where warnings are errors."""

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

from dualparal.ui.serve import launch
from dualparal.ui.studio import Studio
from tests.fakes import FakeEngine

DEADLINE_S = 120
GRADIO_WARNINGS = [
    # gradio_client leaves its event stream's socket to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # gradio's queue statistics use what pandas 3 has deprecated
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


class Server:
    """A page on a free port with a client of its own."""

    def __init__(self, outputs: Path, auth: list[tuple[str, str]] | None = None, **engine: Any) -> None:
        self.engine = FakeEngine(outputs=outputs, **engine).start(wait=False)
        self.page: gr.Blocks = launch(Studio(self.engine), quiet=True, auth=auth)  # type: ignore[arg-type]
        self.url = str(self.page.local_url)
        self.client = self.new_client(auth=auth[0] if auth else None)

    def new_client(self, **options: Any) -> Client:
        return Client(self.url, verbose=False, **options)

    def close(self) -> None:
        self.client.close()
        self.page.close(verbose=False)
        self.engine.close()
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
