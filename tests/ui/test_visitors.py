"""What one address may fill of the queue, whatever owners it invents, and what the operator's key opens."""

from __future__ import annotations

from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from dualparal.errors import QueueFull
from dualparal.presets import Limits, Preset, complete
from dualparal.request import GenerationRequest
from dualparal.ui.visitors import LONGEST_VIDEOS, Visitors, work_of
from tests.page_server import GRADIO_WARNINGS, Server

PRESET = Preset(name="p", title="p", height=64, width=64, fps=16, num_inference_steps=20, limits=Limits(seconds=100))


def test_work_is_counted_in_longest_videos() -> None:
    longest = complete(GenerationRequest(prompt="x", seconds=100), PRESET)
    assert work_of(longest, PRESET) == pytest.approx(1, rel=0.01)
    half = complete(GenerationRequest(prompt="x", seconds=100, num_inference_steps=10, width=128), PRESET)
    assert work_of(half, PRESET) == pytest.approx(1, rel=0.01)


def test_an_address_has_so_many_jobs_under_any_names() -> None:
    open_ids = {"a", "b"}
    visitors = Visitors(lambda: open_ids, max_jobs=2)
    for job_id in ("a", "b"):
        with visitors.submitting("10.0.0.1", 0.1) as remember:
            remember(job_id)
    with pytest.raises(QueueFull, match="2 jobs from your address"), visitors.submitting("10.0.0.1", 0.1):
        raise AssertionError
    for other in ("10.0.0.2", ""):  # nobody knows where a job of the command line comes from
        with visitors.submitting(other, 0.1):
            pass
    open_ids.remove("a")
    with visitors.submitting("10.0.0.1", 0.1):
        pass


def test_an_address_has_so_much_work() -> None:
    visitors = Visitors(lambda: {"a"}, max_jobs=100)
    with visitors.submitting("10.0.0.1", 50.0) as remember:  # one job is taken whatever it is
        remember("a")
    with pytest.raises(QueueFull, match=f"may be that of {LONGEST_VIDEOS}"), visitors.submitting("10.0.0.1", 0.1):
        raise AssertionError


def test_no_limit_is_none() -> None:
    visitors = Visitors(lambda: {"a"}, max_jobs=None)
    for _ in range(100):
        with visitors.submitting("10.0.0.1", 50.0) as remember:
            remember("a")


def test_a_job_that_was_not_taken_counts_for_nothing() -> None:
    visitors = Visitors(lambda: {"a"}, max_jobs=1)
    with pytest.raises(ValueError, match="refused"), visitors.submitting("10.0.0.1", 0.1):
        raise ValueError("refused")
    with visitors.submitting("10.0.0.1", 0.1):
        pass


class TestOverHTTP:
    pytestmark = GRADIO_WARNINGS

    def test_limit_and_key(self, tmp_path: Path) -> None:
        made = Server(tmp_path, item_s=0.05, max_queue=50)
        try:
            made.studio.visitors._max_jobs = 3
            made.studio.operator_key = "let me in"
            ask = {"prompt": "a kite", "seconds": 20, "num_inference_steps": 50}
            ids = [made.client.predict(**ask, owner=f"name {n}", api_name="/submit")["job_id"] for n in range(3)]
            with pytest.raises(AppError, match="3 jobs from your address"):
                made.client.predict(**ask, owner="name 4", api_name="/submit")
            stranger, operator = {"owner": "name 1"}, {"owner": "let me in"}
            self._refused(made.client, ids[0], stranger)
            assert made.client.predict(job_id=ids[0], **operator, api_name="/cancel")["job_id"] == ids[0]
            made.wait(ids[0], lambda status: status["state"] == "cancelled", **operator)
            self._refused(made.client, ids[0], stranger)
            made.client.predict(job_id=ids[0], **operator, api_name="/delete")
            assert not (tmp_path / ids[0]).exists()
            for job_id in ids[1:]:
                made.client.predict(job_id=job_id, **operator, api_name="/cancel")
        finally:
            made.close()

    def _refused(self, client: Client, job_id: str, who: dict[str, str]) -> None:
        for name in ("/status", "/cancel", "/delete"):
            with pytest.raises(AppError, match="there is no job"):
                client.predict(job_id=job_id, **who, api_name=name)
