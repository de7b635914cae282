"""Following a video from outside: server-sent events with their resumption, and HLS with ffmpeg as the player."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dualparal.events import BlockReady, Look, Progress
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.history import History
from dualparal.media.ffmpeg import ffmpeg_path
from dualparal.method.rules import plan_of
from dualparal.presets import complete
from dualparal.request import GenerationRequest
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.v1 import events
from dualparal.ui.v1.events import END, Place, news
from dualparal.ui.v1.live import playlist
from tests.conftest import wait_until
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, PAGE_PRESET, Server
from tests.ui.v1.test_videos import ANN, LONG, SHORT, frames_in, raw, started, until

pytestmark = GRADIO_WARNINGS
JOB = "abcdef-123456"
NUM_BLOCKS = 6  # of LONG


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, item_s=0.005, keys=(ANN,))
    yield made
    made.close()


def events_in(lines: Iterator[str]) -> Iterator[tuple[str, str, Any]]:
    """(name, id, data) of each event, as the HTML standard reads them."""
    found: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            found[name] = value.removeprefix(" ")
        elif "data" in found:
            yield found["event"], found["id"], json.loads(found["data"])
            found = {}


def follow(server: Server, video_id: str, last_id: str | None = None, until_block: int | None = None) -> list[Any]:
    """Events to the stream's end, or to the one of a block."""
    told = []
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with raw(server) as client, client.stream("GET", f"/videos/{video_id}/events", headers=headers) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        for event in events_in(answer.iter_lines()):
            told.append(event)
            if event[0] == "block" and event[2]["block"] == until_block:
                break
    return told


# Events


def test_events_are_gone_on_with_where_they_broke_off(server: Server) -> None:
    video_id = started(server)
    before = follow(server, video_id, until_block=1)
    assert [data["block"] for name, _, data in before if name == "block"] == [0, 1]
    threading.Timer(0.5, server.groups.let_go.set).start()
    after = follow(server, video_id, last_id=before[-1][1])
    assert [data["block"] for name, _, data in after if name == "block"] == list(range(2, NUM_BLOCKS))
    assert any(name == "progress" and data["status"] == "in_progress" and data["num_items"] for name, _, data in before + after)
    name, last_id, video = after[-1]
    assert (name, last_id) == ("completed", END) and video["id"] == video_id and len(video["blocks"]) == NUM_BLOCKS
    with raw(server) as client:
        for told, _, data in before + after:
            if told == "block":
                assert client.get(data["url"].removeprefix("/v1")).headers["content-type"] == "video/mp2t"
        assert client.get(f"/videos/{video_id}/events", headers={"Last-Event-ID": END}).status_code == 204
    again = follow(server, video_id)
    assert [name for name, _, _ in again] == ["block"] * NUM_BLOCKS + ["completed"]


def test_one_that_waits_and_one_that_is_deleted(server: Server) -> None:
    started(server)
    with raw(server) as client:
        waiting = client.post("/videos", json={"prompt": "a boat", **SHORT}).json()["id"]
        told: list[Any] = []
        follower = threading.Thread(target=lambda: told.extend(follow(server, waiting)))
        follower.start()
        assert wait_until(lambda: events._num_followers == 1, DEADLINE_S)
        assert client.delete(f"/videos/{waiting}").json()["deleted"]
        follower.join(DEADLINE_S)
    assert told[0][0] == "progress" and told[0][2]["status"] == "queued" and told[-1][0] in ("failed", "gone")


class Urls:
    def url(self, found: Snapshot, name: str) -> str:
        return f"/{name}?link=x"


def snapshot(num_blocks: int, items_done: int, looks: dict[int, Look], state: str = "running") -> Snapshot:
    blocks = tuple(
        BlockReady(job_id=JOB, block=n, path=f"/x/{n}.ts", first_frame=4 * n, num_frames=4, duration_s=0.25)
        for n in range(num_blocks)
    )
    progress = Progress(job_id=JOB, items_done=items_done, num_items=40, num_steps=4, block_steps=(4, 2))
    request: Any = type("Request", (), {"num_frames": 40, "num_per_block": 4, "num_cat": 2, "fps": 16})()
    return Snapshot(
        job_id=JOB, request=request, owner="", folder=JobFolder(Path("/x") / JOB), state=state,
        history=History(state=state, blocks=blocks), progress=progress, looks=looks,
    )  # fmt: skip


def names(events: list[bytes]) -> list[str]:
    return [event.split(b"\n")[0].removeprefix(b"event: ").decode() for event in events]


def test_what_is_new() -> None:
    looks = {n: Look(job_id=JOB, block=n, step=2, num_steps=4, num_pictures=1, picture=b"x", time_s=100.0 + n) for n in (1, 0)}
    urls: Any = Urls()
    events, place = news(snapshot(2, 6, looks), urls, Place())
    assert names(events) == ["block", "block", "look", "look", "progress"]
    read = Place.read(str(place))
    assert read is not None and (read.num_blocks, read.look_ms) == (2, 101_000)
    assert news(snapshot(2, 6, looks), urls, place) == ([], place), "nothing has changed"
    assert names(news(snapshot(2, 6, looks), urls, read)[0]) == ["progress"], "who comes back gets where it stands"
    newer = {**looks, 1: dataclasses.replace(looks[1], step=3, time_s=103.0)}
    assert names(news(snapshot(3, 6, newer), urls, place)[0]) == ["block", "look"]
    assert names(news(snapshot(3, 9, newer), urls, place, is_due=False)[0]) == ["block"], "the rest waits for its turn"
    assert names(news(snapshot(2, 6, looks), urls, place, has_moved=True)[0]) == ["progress"]


@pytest.mark.parametrize("text", [None, "", "x", "1.2", "-1.0.0", "1.2.3.4", "9" * 50, "1.2.3\n"])
def test_an_id_that_is_none_is_the_beginning(text: str | None) -> None:
    assert Place.read(text) == Place()


# HLS


def test_ffmpeg_plays_a_video_while_it_grows(server: Server, tmp_path: Path) -> None:
    video_id = started(server)
    with raw(server) as client:
        address = client.get(f"/videos/{video_id}").json()["live_url"].removeprefix("/")
        text = httpx.get(server.url + address).text
    assert text.count("#EXTINF") == 2 and "ENDLIST" not in text and "TYPE:EVENT" in text
    target = tmp_path / "live.mp4"
    command = [ffmpeg_path(), "-v", "error", "-live_start_index", "0", "-i", server.url + address, "-c", "copy", str(target)]
    player = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        threading.Timer(1.0, server.groups.let_go.set).start()
        _, said = player.communicate(timeout=DEADLINE_S)
    finally:
        player.kill()
    assert player.returncode == 0, said
    assert frames_in(target) == 97
    with raw(server) as client:
        until(client, video_id, lambda found: found["status"] == "completed")
    ended = httpx.get(server.url + address)
    assert ended.text.endswith("#EXT-X-ENDLIST\n") and ended.text.startswith(text), "lines are only added"
    assert ended.headers["content-type"].startswith("application/vnd.apple.mpegurl")


def test_before_the_first_block(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.ui.v1.live.FIRST_BLOCK_S", 0.3)
    server.groups.slow_at = 1
    started_id = None
    with raw(server) as client:
        started_id = client.post("/videos", json={"prompt": "a slow kite", **LONG}).json()["id"]
        waiting = client.post("/videos", json={"prompt": "a boat", **SHORT}).json()["id"]
        answer = client.get(f"/videos/{waiting}/live.m3u8")
        assert answer.status_code == 503 and answer.headers["retry-after"]
        client.post(f"/videos/{waiting}/cancel")
        assert client.get(f"/videos/{waiting}/live.m3u8").status_code == 404
        assert client.get(f"/videos/{started_id}/looks/0.jpg").status_code == 404


@pytest.mark.parametrize(("num_per_block", "num_cat"), [(1, 0), (1, 1), (4, 2), (4, 4), (8, 3)])
def test_no_block_is_longer_than_the_list_says(num_per_block: int, num_cat: int) -> None:
    asked = GenerationRequest(prompt="x", latents_num=40, num_per_block=num_per_block, num_cat=num_cat)
    settings = complete(asked, PAGE_PRESET)
    plan = plan_of(settings)
    longest_s = max(len(plan.frames(block)) for block in range(plan.num_blocks)) / settings.fps
    found: Any = dataclasses.replace(snapshot(0, 0, {}), request=settings)
    assert int(re.findall(r"TARGETDURATION:(\d+)", playlist(found, "k"))[0]) >= longest_s


def test_the_list_ends_with_the_job() -> None:
    found = snapshot(3, 12, {}, state="running")
    lines = playlist(found, "k").splitlines()
    assert "#EXT-X-TARGETDURATION:2" in lines and lines[-1] == "segments/2.ts?link=k"
    assert playlist(snapshot(3, 12, {}, state="finished"), "k").splitlines()[-1] == "#EXT-X-ENDLIST"
