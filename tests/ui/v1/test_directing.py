"""What `/v1/videos` has beside OpenAI's calls: shots, takes, films that go on from others, steering and wrapping up, through
OpenAI's own client where it has a way, and with the page's limits and owners."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dualparal.errors import RequestError
from dualparal.events import Steered
from dualparal.ui.v1 import calls
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server
from tests.ui.v1.test_videos import ANN, BOB, LONG, SHORT, client_of, error_of, raw, started, until

pytestmark = [*GRADIO_WARNINGS, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]
OPERATOR = "the-operator-has-this-key"
ENDLESS = {"prompt": "a kite", "is_endless": True, "num_inference_steps": 4, "schedule": "preview", "context": "cached"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("v1"), item_s=0.003, keys=(ANN, BOB), max_queue=8)
    made.studio.operator_key = OPERATOR
    yield made
    made.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, item_s=0.01, keys=(ANN, BOB), max_queue=2)
    yield made
    made.close()


def test_shots(server: Server) -> None:
    shots: list[dict[str, Any]] = [
        {"prompt": "it rises", "seconds": 1, "transition": "switch"},
        {"prompt": "it falls", "seconds": 1, "transition": "cut"},
    ]
    video = client_of(server).videos.create(prompt="a red kite", extra_body={"shots": shots, "num_inference_steps": 3})
    assert video.model_extra is not None
    made = [video.model_extra["settings"]["shots"]]
    with raw(server) as client:
        asked: dict[str, Any] = {"prompt": "a red kite", "num_inference_steps": 3}
        form = {name: (None, str(value)) for name, value in asked.items()} | {"shots": (None, json.dumps(shots))}
        made += [client.post("/videos", files=form).json()["settings"]["shots"]]
        made += [client.post("/videos", json={**asked, "shots": shots}).json()["settings"]["shots"]]
        assert made[0] == made[1] == made[2]
        assert [(shot["prompt"], shot["transition"]) for shot in made[0]] == [("it rises", "switch"), ("it falls", "cut")]
        alone = client.post("/videos", json={"shots": shots, "num_inference_steps": 3}).json()
        assert alone["prompt"] == "it rises · it falls", "they are prompts enough"
        until(client, alone["id"], lambda found: found["status"] == "completed")
        for bad in ("x", [{}], [{"prompt": 7}], [{"prompt": "x", "seconds": "NaN"}], [{"prompt": "x", "fade": 1}], {"a": 1}):
            answer = client.post("/videos", json={"prompt": "x", "shots": bad})
            assert answer.status_code == 400 and error_of(answer)["param"] == "shots", answer.text


def test_lists_in_a_form_that_cannot_be_told_apart(server: Server) -> None:
    with raw(server) as client:
        for form in (
            [("shots[][prompt]", "a"), ("shots[][prompt]", "b"), ("shots[][seconds]", "1")],
            [("shots[]", "a"), ("shots[][prompt]", "b")],
            [("shots", "[]"), ("shots[][prompt]", "b")],
            [("shots[][prompt]", "a"), ("shots[][__class__]", "b")],
            [("shots[][prompt]", "a"), ("shots[][seconds]", "1e999")],
            [("loras[]", "../../etc/passwd")],
        ):
            answer = client.post("/videos", files=[("prompt", (None, "x")), *((name, (None, value)) for name, value in form)])
            assert answer.status_code == 400 and error_of(answer)["param"] in ("shots", "loras"), answer.text


def test_takes_rest_and_one_is_chosen(server: Server) -> None:
    client = client_of(server)
    first = client.videos.create(prompt="a kite", seconds="1", extra_body={"takes": 3, "num_inference_steps": 12, "seed": 5})
    assert first.model_extra is not None
    ids: list[str] = first.model_extra["takes"]
    assert len(ids) == 3 and ids[0] == first.id
    for one in ids:
        rested = client.videos.poll(one, poll_interval_ms=100)
        assert rested.status == "failed" and rested.error is not None and rested.error.code == "resting"
    with raw(server) as http:
        listed = http.get(f"/videos/{ids[1]}/takes").json()
        assert [(one["id"], one["take"]) for one in listed["data"]] == [(one, n) for n, one in enumerate(ids, 1)]
        assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, ids[0], ids[2])
        assert http.post(f"/videos/{ids[1]}/resume").status_code == 200
        chosen = until(http, ids[1], lambda found: found["status"] == "completed")
        assert chosen["settings"]["seed"] == 6 and chosen["take"] == 2
        form = {"prompt": (None, "a kite"), "seconds": (None, "1"), "takes": (None, "2")}
        assert len(http.post("/videos", files=form).json()["takes"]) == 2, "in a form all values are texts"
        for bad in (0, 99, 1.5, "many", [2], -1):
            assert error_of(http.post("/videos", json={"prompt": "x", "takes": bad}))["param"] == "takes"
        alone = http.post("/videos", json={"prompt": "a boat", **SHORT, "takes": 1}).json()
        assert "takes" not in alone and alone["take"] is None
        assert [one["id"] for one in http.get(f"/videos/{alone['id']}/takes").json()["data"]] == [alone["id"]]
    with raw(server, BOB) as bob, raw(server, OPERATOR) as operator:
        assert error_of(bob.get(f"/videos/{ids[0]}/takes"))["code"] == "video_not_found"
        assert [one["id"] for one in operator.get(f"/videos/{ids[2]}/takes").json()["data"]] == ids


def test_takes_are_queued_together_or_not_at_all(slow: Server) -> None:
    started(slow)
    with raw(slow) as client:
        answer = client.post("/videos", json={"prompt": "a kite", **SHORT, "takes": 4})
        assert answer.status_code == 429 and error_of(answer)["code"] == "queue_full"
        assert [one["status"] for one in client.get("/videos").json()["data"] if one["prompt"] == "a kite"] in (
            [], ["failed"] * 2, ["failed"] * 3,
        )  # fmt: skip


def test_a_film_goes_on(server: Server) -> None:
    client, more = client_of(server), {"num_inference_steps": 3}
    first = client.videos.create_and_poll(prompt="a kite", seconds="1", extra_body=more, poll_interval_ms=100)
    asked = {**more, "continue_from": first.id, "join": True}
    second = client.videos.create_and_poll(prompt="a boat", seconds="1", extra_body=asked, poll_interval_ms=100)
    assert second.status == "completed" and second.model_extra is not None
    assert second.model_extra["continue_from"] == first.id and second.model_extra["num_frames"] == 16
    with raw(server) as http, raw(server, BOB) as bob:
        for given in ("0" * 12, "../etc", "", 7, [first.id], "\ud800", "x" * 9000):
            answer = http.post("/videos", content=json.dumps({"prompt": "x", "continue_from": given}))
            assert answer.status_code == 400 and error_of(answer)["param"] in ("continue_from", "job_id"), (given, answer.text)
        answer = bob.post("/videos", json={"prompt": "x", "continue_from": first.id})
        assert answer.status_code == 400 and f"there is no job {first.id}" in error_of(answer)["message"], "somebody else's"


def test_steered_while_it_runs(slow: Server) -> None:
    few = {"schedule": "preview", "context": "cached", "max_in_flight": 2, **LONG}
    with raw(slow) as client, raw(slow, BOB) as bob:
        video_id = client.post("/videos", json={"prompt": "a slow kite", **few}).json()["id"]
        until(client, video_id, lambda found: len(found["blocks"]) == 2)
        assert error_of(bob.post(f"/videos/{video_id}/steer", json={"prompt": "x"}))["code"] == "video_not_found"
        told: list[httpx.Response] = []
        asked = {"prompt": "a dog runs", "transition": "cut"}
        caller = threading.Thread(target=lambda: told.append(client.post(f"/videos/{video_id}/steer", json=asked)))
        caller.start()
        slow.groups.let_go.set()
        caller.join(DEADLINE_S)
        assert told[0].status_code == 200, told[0].text
        steered = told[0].json()["steered"]
        found = until(client, video_id, lambda found: found["status"] == "completed")
        last = found["settings"]["shots"][-1]
        assert (last["prompt"], last["transition"]) == ("a dog runs", "cut") and steered["block"] > 0 < steered["from_s"]
        assert found["num_frames"] == found["num_frames_ready"]
        answer = client.post(f"/videos/{video_id}/steer", json={"prompt": "too late"})
        assert answer.status_code == 400 and "only a running job" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 7}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"), ({"prompt": "x", "transition": "fade"}, "transition"),
        ({"prompt": "x", "transition": 1e308}, "transition"), ({"prompt": "x", "transition": ["cut"]}, "transition"),
        ({"prompt": "x", "seconds": 2}, "seconds"), ({"prompt": "x", "\x00" * 90: 2}, "\x00" * 60),
    ],
)  # fmt: skip
def test_steering_that_is_refused(server: Server, body: dict[str, Any], param: str) -> None:
    with raw(server) as client:
        video_id = client.post("/videos", json={"prompt": "a slow kite", **SHORT}).json()["id"]
        answer = client.post(f"/videos/{video_id}/steer", json=body)
        assert answer.status_code == 400 and error_of(answer)["param"] == param
        for text in (b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 60_000):
            assert error_of(client.post(f"/videos/{video_id}/steer", content=text))["code"] == "invalid_json"
        assert client.post(f"/videos/{video_id}/steer", files={"prompt": (None, "x")}).status_code == 400
        client.delete(f"/videos/{video_id}")


def test_few_wait_at_once_for_one_video(slow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps the server's threads by steering one video over and over."""
    monkeypatch.setattr(calls, "MAX_WAITS_EACH", 1)
    waits, held = threading.Event(), threading.Event()

    def steer(*_: object) -> Steered:
        waits.set()
        held.wait(DEADLINE_S)
        raise RequestError("too late", "prompt")

    monkeypatch.setattr(slow.studio, "steer", steer)
    video_id = started(slow)
    try:
        with raw(slow) as client, raw(slow) as other:
            caller = threading.Thread(target=lambda: client.post(f"/videos/{video_id}/steer", json={"prompt": "x"}))
            caller.start()
            assert waits.wait(DEADLINE_S)
            answer = other.post(f"/videos/{video_id}/finish")
            assert answer.status_code == 503 and error_of(answer)["code"] == "busy" and answer.headers["retry-after"]
            assert other.get(f"/videos/{video_id}").status_code == 200
            held.set()
            caller.join(DEADLINE_S)
    finally:
        held.set()


def test_an_endless_film_is_wrapped_up(slow: Server) -> None:
    with raw(slow) as client:
        video_id = client.post("/videos", json=ENDLESS).json()["id"]
        until(client, video_id, lambda found: len(found["blocks"]) >= 2)
        assert client.post(f"/videos/{video_id}/finish").status_code == 200
        found = until(client, video_id, lambda found: found["status"] == "completed")
        assert found["num_frames"] == found["num_frames_ready"] > 0
        assert client.post(f"/videos/{video_id}/finish").status_code == 400
