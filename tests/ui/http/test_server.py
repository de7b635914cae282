"""The page behind its layers: who follows a job holds nobody up, what visitors leave is bounded, logins guard every route."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from dualparal.ui.http import sessions
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server

pytestmark = GRADIO_WARNINGS
SLOTS = 40  # Gradio's own


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, item_s=0.05, max_queue=100)
    yield made
    made.close()


def test_a_busy_machine_opens_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio gives up where its own page is not drawn within 3 s."""

    def too_late(*_: Any, **__: Any) -> httpx.Response:
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(httpx, "head", too_late)
    made = Server(tmp_path)
    try:
        assert httpx.get(f"{made.url}healthz", timeout=DEADLINE_S).json() == {"status": "alive"}
    finally:
        made.close()


def test_who_waits_for_a_video_takes_no_ones_place(server: Server) -> None:
    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_S, limits=limits) as client:
            long = {"prompt": "a kite", "seconds": 20, "num_inference_steps": 50, "owner": "me"}
            made = (await client.post("gradio_api/call/v2/submit", json=long)).json()
            async with client.stream("GET", f"gradio_api/call/submit/{made['event_id']}") as answer:
                text = (await answer.aread()).decode()
            job_id = json.loads(text.split("data: ")[1].split("\n")[0])[0]["job_id"]
            waiting = [asyncio.create_task(_hold(client, number)) for number in range(SLOTS + 8)]
            until = time.monotonic() + DEADLINE_S
            while sum(job is not None for job in server.page._queue.active_jobs) < SLOTS and time.monotonic() < until:
                await asyncio.sleep(0.1)
            assert sum(job is not None for job in server.page._queue.active_jobs) >= SLOTS, "they are not all there"
            status = await asyncio.wait_for(_status(client, job_id), DEADLINE_S)
            assert status["job_id"] == job_id
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    server.studio.visitors._max_jobs = None  # all come from one address
    asyncio.run(run())


async def _hold(client: httpx.AsyncClient, number: int) -> None:
    values = {"prompt": "a kite", "seconds": 20, "num_inference_steps": 50, "owner": f"visitor {number}"}
    event = (await client.post("gradio_api/call/v2/generate", json=values)).json()["event_id"]
    async with client.stream("GET", f"gradio_api/call/generate/{event}") as answer:
        async for _ in answer.aiter_lines():
            pass


async def _status(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    event = (await client.post("gradio_api/call/v2/status", json={"job_id": job_id, "owner": "me"})).json()["event_id"]
    async with client.stream("GET", f"gradio_api/call/status/{event}") as answer:
        text = (await answer.aread()).decode()
    found: dict[str, Any] = json.loads(text.split("data: ")[1].split("\n")[0])[0]
    return found


def test_calls_leave_next_to_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_STREAMS", 100)
    server.page.app.state_holder.capacity = 100
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:

        def calls(number: int) -> int:
            for _ in range(number):
                event = client.post("gradio_api/call/presets", json={"data": []}).json()["event_id"]
                assert "usable" in client.get(f"gradio_api/call/presets/{event}").text
            gc.collect()
            return psutil.Process().memory_info().rss

        before = calls(150)
        after = calls(450)
    queue, holder = server.page._queue, server.page.app.state_holder
    assert len(queue.pending_messages_per_session) <= 100 and len(queue.pending_event_ids_session) <= 100
    assert len(holder.session_data) <= 100 and not queue.event_analytics
    assert after - before < 450 * 40_000, "Gradio alone keeps 168 kB of each call"


def test_a_stream_that_waits_is_never_thrown_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_STREAMS", 10)
    streams = server.page._queue.pending_messages_per_session
    server.page._queue.pending_event_ids_session["waits"] = {"event"}
    streams["waits"] = "messages"
    for number in range(100):
        streams[f"idle {number}"] = "messages"
        server.page._queue.pending_event_ids_session[f"idle {number}"] = set()
    assert "waits" in streams and len(streams) <= 10
    assert len(server.page._queue.pending_event_ids_session) <= 11


def test_a_tab_keeps_its_state_whatever_strangers_call(server: Server) -> None:
    holder = server.page.app.state_holder
    holder.capacity = 5
    with httpx.stream("GET", f"{server.url}gradio_api/heartbeat/mine", timeout=DEADLINE_S) as beat:
        assert next(beat.iter_bytes())
        holder["mine"].state_data[1] = "job"
        for number in range(50):
            assert holder[f"stranger {number}"]
        assert holder["mine"].state_data == {1: "job"}
    assert len(holder.session_data) <= 5


@pytest.mark.parametrize(
    "path", ["heartbeat/x", "stream/a/b/c/playlist.m3u8", "info", "queue/data?session_hash=x", "file=/etc/x"]
)
def test_nothing_is_open_before_the_login(locked: Server, path: str) -> None:
    assert httpx.get(f"{locked.url}gradio_api/{path}", timeout=DEADLINE_S).status_code == 401


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("locked"), auth=[("ann", "secret")])
    yield made
    made.close()


def test_a_login_opens_them(locked: Server) -> None:
    with httpx.Client(base_url=locked.url, timeout=DEADLINE_S) as client:
        assert client.post("login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.post("login", data={"username": "ann", "password": "secret"}).status_code == 200
        assert client.get("gradio_api/info").status_code == 200


def test_an_address_in_place_of_a_file_is_not_fetched(server: Server) -> None:
    number = next(fn for fn in server.page.fns.values() if getattr(fn.fn, "__name__", "") == "_restore")._id
    value = {"path": "http://127.0.0.1:1/big.mp4", "url": "http://127.0.0.1:1/big.mp4", "meta": {"_type": "gradio.FileData"}}
    fn = server.page.fns[number]
    data = [value, *[None] * (len(fn.inputs) - 1)]
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
        joined = client.post("gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": "x"})
        assert joined.status_code == 200
        text = client.get("gradio_api/queue/data", params={"session_hash": "x"}).text
    assert '"success":false' in text.replace(" ", "") and "refused" not in text


def test_a_body_in_a_call_is_bounded(server: Server) -> None:
    found = httpx.post(f"{server.url}gradio_api/queue/join", content=b"[" * 70_000, timeout=DEADLINE_S)
    assert found.status_code == 413
    found = httpx.post(f"{server.url}gradio_api/queue/join", json={"data": "x" * 40_000}, timeout=DEADLINE_S)
    assert found.status_code == 422 and len(found.text) < 2_000, "a refusal repeats what was sent"
