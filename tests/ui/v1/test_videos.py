"""`/v1/videos` over fake workers through OpenAI's own client: every call, good and bad; whose is whose."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from dualparal.errors import RequestError
from dualparal.media.ffmpeg import ffmpeg_path
from dualparal.media.metadata import describe, read_settings
from dualparal.ui.http.bodies import MAX_CALL_BYTES
from dualparal.ui.v1 import asked
from dualparal.ui.v1.keys import read_keys
from dualparal.ui.v1.ranges import PIECE_BYTES, FileAnswer
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server

pytestmark = [*GRADIO_WARNINGS, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]
ANN, BOB, OTHER = "ann-has-this-key-0001", "bob-has-this-key-0002", "nobody-has-this-key-3"
SHORT: dict[str, Any] = {"seconds": 1, "num_inference_steps": 3}
LONG: dict[str, Any] = {"seconds": 6, "num_inference_steps": 6}


def client_of(server: Server, key: str = ANN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}v1", api_key=key, max_retries=0, timeout=DEADLINE_S)


def raw(server: Server, key: str | None = ANN) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=f"{server.url}v1", headers=headers, timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("v1"), item_s=0.003, keys=(ANN, BOB), max_queue=8)
    yield made
    made.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, item_s=0.01, keys=(ANN, BOB), max_queue=2)
    yield made
    made.close()


def until(client: httpx.Client, video_id: str, done: Any) -> dict[str, Any]:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        found: dict[str, Any] = client.get(f"/videos/{video_id}").json()
        if done(found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"video {video_id} did not get there: {found}")


def started(server: Server, key: str = ANN) -> str:
    """A job that waits after its second block."""
    with raw(server, key) as client:
        video_id = client.post("/videos", json={"prompt": "a slow kite", **LONG}).json()["id"]
        until(client, video_id, lambda found: len(found["blocks"]) == 2)
    return str(video_id)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """What is refused is refused in OpenAI's form."""
    assert list(answer.json()) == ["error"], answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and error["message"]
    return error


# OpenAI's client


def test_create_poll_and_download(server: Server, tmp_path: Path) -> None:
    client = client_of(server)
    video = client.videos.create_and_poll(
        prompt="a red kite", seconds="1", size="96x64", extra_body={"seed": 7, "num_inference_steps": 3}, poll_interval_ms=100
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.size, video.seconds, video.prompt, video.model) == ("96x64", "1.0625", "a red kite", "pocket")
    assert video.completed_at is not None and video.completed_at >= video.created_at
    own = video.model_extra
    assert own is not None and own["settings"]["seed"] == 7 and own["num_frames_ready"] == 17 and own["timings"]["total_s"] > 0
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    assert describe(tmp_path / "video.mp4")["num_frames"] == 17
    assert read_settings(tmp_path / "video.mp4").seed == 7
    picture = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").content))
    assert picture.format == "JPEG" and picture.size == (96, 64)
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)


def test_a_picture_to_begin_with(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (120, 80), (200, 30, 30)).save(tmp_path / "red.png")
    more = {"num_inference_steps": 3, "seed": 7}
    video = client_of(server).videos.create(prompt="a kite", seconds="1", input_reference=tmp_path / "red.png", extra_body=more)
    with raw(server) as client:
        text = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
        picture = {"image_url": f"data:image/png;base64,{text}"}
        same = client.post("/videos", json={"prompt": "a kite", "seconds": 1, "input_reference": picture, **more}).json()
        settings = [client.get(f"/videos/{one}").json()["settings"] for one in (video.id, same["id"])]
    assert settings[0] == settings[1] and settings[0]["start_image"]
    assert [path.name for path in Path(get_upload_folder()).glob("v1-*")] == []


def test_lists_in_pages_newest_first(server: Server) -> None:
    client = client_of(server, BOB)
    made = [client.videos.create(prompt=f"kite {n}", seconds="1", extra_body={"num_inference_steps": 3}).id for n in range(3)]
    with raw(server, BOB) as http:
        for one in made:
            until(http, one, lambda found: found["status"] == "completed")
        first = http.get("/videos", params={"limit": 2}).json()
        assert [one["id"] for one in first["data"]] == made[:0:-1] and first["has_more"]
        assert (first["first_id"], first["last_id"]) == (made[2], made[1])
    assert [one.id for one in client.videos.list(limit=2)] == made[::-1], "page after page"
    assert [one.id for one in client.videos.list(limit=2, order="asc")] == made
    assert all(one.prompt != "kite 0" for one in client_of(server).videos.list()), "of others nothing"
    for one in made:
        client.videos.delete(one)
    assert client.videos.list().data == []


def test_models(server: Server) -> None:
    assert [model.id for model in client_of(server).models.list()] == ["pocket"]


# Running jobs


def test_the_finished_prefix_grows_and_is_read_by_ranges(slow: Server, tmp_path: Path) -> None:
    video_id = started(slow)
    with raw(slow) as client:
        found = client.get(f"/videos/{video_id}").json()
        assert found["status"] == "in_progress" and 0 < found["progress"] < 100 and found["error"] is None
        whole = client.get(f"/videos/{video_id}/content")
        assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp2t")
        parts = [client.get(block["url"].removeprefix("/v1")).content for block in found["blocks"]]
        assert whole.content == b"".join(parts) and int(whole.headers["content-length"]) == len(whole.content)
        size = len(whole.content)
        for asked, span in (
            ("bytes=0-9", (0, 10)), ("bytes=10-", (10, size)), ("bytes=-5", (size - 5, size)),
            (f"bytes={len(parts[0]) - 3}-{len(parts[0]) + 3}", (len(parts[0]) - 3, len(parts[0]) + 4)),
        ):  # fmt: skip
            part = client.get(f"/videos/{video_id}/content", headers={"Range": asked})
            assert part.status_code == 206 and part.content == whole.content[slice(*span)]
            assert part.headers["content-range"] == f"bytes {span[0]}-{span[1] - 1}/*"
        behind = client.get(f"/videos/{video_id}/content", headers={"Range": f"bytes={size}-"})
        assert behind.status_code == 416 and error_of(behind)["code"] == "range_not_satisfiable"
        assert client.get(f"/videos/{video_id}/content", headers={"Range": "bytes=5-2"}).content == whole.content
        other = client.get(f"/videos/{video_id}/content", headers={"Range": "bytes=1-2", "If-Range": '"another"'})
        assert other.content == whole.content
        assert client.get(f"/videos/{video_id}/content", params={"format": "mp4"}).status_code == 404

        slow.groups.let_go.set()
        until(client, video_id, lambda found: found["status"] == "completed")
        rest = client.get(f"/videos/{video_id}/content", params={"format": "ts"}, headers={"Range": f"bytes={size}-"})
        (tmp_path / "all.ts").write_bytes(whole.content + rest.content)
        (tmp_path / "all.mp4").write_bytes(client.get(f"/videos/{video_id}/content").content)
    num_frames = describe(tmp_path / "all.mp4")["num_frames"]
    assert frames_in(tmp_path / "all.ts") == num_frames == 97


def test_what_is_asked_for_by_head_sends_nothing(slow: Server) -> None:
    """Also of what would go on until the video has ended."""
    video_id = started(slow)
    with raw(slow) as client:
        for path, kind in (("events", "text/event-stream"), ("content", "video/mp2t"), ("segments/0.ts", "video/mp2t")):
            answer = client.head(f"/videos/{video_id}/{path}")
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind) and answer.content == b""
        assert int(answer.headers["content-length"]) == len(client.get(f"/videos/{video_id}/segments/0.ts").content)


def test_deleted_and_replaced_while_it_is_sent(tmp_path: Path) -> None:
    """What was begun is sent to its end, as it was; what is gone before is not found."""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"a" * 3 * PIECE_BYTES)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        path.unlink(missing_ok=True)
        (tmp_path / "other").write_bytes(b"b")
        (tmp_path / "other").replace(path)

    async def receive() -> Any:
        await asyncio.sleep(DEADLINE_S)

    def ask(**headers: str) -> list[Any]:
        sent.clear()
        told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": told, "asgi": {"spec_version": "2.4"}}
        asyncio.run(FileAnswer(path, "video/mp4")(scope, receive, send))
        return sent

    assert b"".join(message.get("body", b"") for message in ask()) == b"a" * 3 * PIECE_BYTES
    head, *body = ask(range="bytes=0-99999")
    assert head["status"] == 206 and body[0]["body"] == b"b"
    for date_or_tag in ('"x"', "Thu, 01 Jan 1970 00:00:00 GMT", "\u00ff"):
        assert ask(range="bytes=0-0", if_range=date_or_tag)[0]["status"] == 200, "it is another by now"
    assert ask(range="bytes=1-")[0]["status"] == 416
    for odd in ("bytes=0-0,2-3", "bytes=", "bytes=-", "lines=0-1", "bytes=5-2", "bytes=\u0661-2"):
        assert ask(range=odd)[0]["status"] == 200, "what is not understood is passed over"
    path.unlink()
    assert ask()[0]["status"] == 404


def frames_in(path: Path) -> int:
    """Frames that ffmpeg decodes from it."""
    command = [ffmpeg_path(), "-v", "error", "-i", str(path), "-f", "framehash", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout.splitlines()
    return sum(not line.startswith("#") for line in lines)


def test_delete_stops_what_runs_and_cancel_keeps_it(slow: Server) -> None:
    kept = started(slow)
    with raw(slow) as client:
        waiting = client.post("/videos", json={"prompt": "a boat", **SHORT}).json()["id"]
        assert client.get(f"/videos/{waiting}").json()["status"] == "queued"
        assert client.delete(f"/videos/{waiting}").json() == {"id": waiting, "object": "video.deleted", "deleted": True}
        client.post(f"/videos/{kept}/cancel")
        found = until(client, kept, lambda found: found["status"] == "failed")
        assert found["error"]["code"] == "cancelled" and found["num_frames_ready"] > 0
        assert client.get(f"/videos/{kept}/content").headers["content-type"] == "video/mp4"
        slow.groups.let_go.set()
        assert client.post(f"/videos/{kept}/resume").json()["status"] in ("queued", "in_progress")
        assert until(client, kept, lambda found: found["status"] == "completed")["num_frames_ready"] == 97
        assert error_of(client.post(f"/videos/{kept}/resume"))["code"] == "invalid_value"
        slow.groups.let_go.clear()
        gone = started(slow)
        assert client.delete(f"/videos/{gone}").json()["deleted"]
        assert not (slow.studio.outputs / gone).exists() and (slow.studio.outputs / kept).exists()
        assert client.get(f"/videos/{gone}").status_code == 404


def test_one_that_fails(server: Server) -> None:
    with raw(server) as client:
        video_id = client.post("/videos", json={"prompt": "fail", **SHORT}).json()["id"]
        found = until(client, video_id, lambda found: found["status"] == "failed")
    assert found["error"] == {"code": "OutOfMemory", "message": found["error"]["message"]}
    assert "812 MiB" in found["error"]["message"] and found["completed_at"] is None


# Whose is whose


@pytest.mark.parametrize(
    "path", ["/videos", "/models", "/videos/abcdef", "/videos/abcdef/content", "/videos/abcdef/looks/0.jpg"]
)
def test_nothing_without_a_key_that_is_known(server: Server, path: str) -> None:
    for key in (None, OTHER, ANN[:-1], ANN + "x", ""):
        with raw(server, key) as client:
            answer = client.get(path)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        client_of(server, OTHER).videos.list()
    with raw(server, OTHER) as client:
        assert client.post("/videos", json={"prompt": "x"}).status_code == 401
        assert client.delete("/videos/abcdef").status_code == 401
        assert client.get("/openapi.json").status_code == 200


def test_keys_are_owners_and_links_read_one_video(slow: Server) -> None:
    video_id = started(slow)
    with raw(slow) as ann, raw(slow, BOB) as bob, raw(slow, None) as nobody:
        found = ann.get(f"/videos/{video_id}").json()
        for answer in (
            bob.get(f"/videos/{video_id}"), bob.delete(f"/videos/{video_id}"), bob.post(f"/videos/{video_id}/cancel"),
            bob.get(f"/videos/{video_id}/content"), bob.get(f"/videos/{video_id}/segments/0.ts"),
        ):  # fmt: skip
            assert answer.status_code == 404 and error_of(answer)["code"] == "video_not_found"
        assert bob.get("/videos").json()["data"] == []
        link = found["content_url"].removeprefix("/v1")
        assert nobody.get(link).status_code == 200
        assert nobody.get(found["blocks"][0]["url"].removeprefix("/v1")).headers["content-type"] == "video/mp2t"
        assert nobody.get(link[:-1] + ("0" if link[-1] != "0" else "1")).status_code == 401
        assert nobody.get(link.replace("/content", "")).status_code == 401, "a link reads contents only"
        assert nobody.delete(link.replace("/content", "")).status_code == 401
        other = ann.post("/videos", json={"prompt": "a boat", **SHORT}).json()["id"]
        assert nobody.get(link.replace(video_id, other)).status_code == 401, "and those of one video only"


def test_without_keys_a_token_is_an_owners_secret(tmp_path: Path) -> None:
    server = Server(tmp_path, item_s=0.001)
    try:
        with raw(server, "ann") as ann, raw(server, "bob") as bob, raw(server, None) as nobody:
            mine = ann.post("/videos", json={"prompt": "a kite", **SHORT}).json()["id"]
            assert bob.get(f"/videos/{mine}").status_code == nobody.get(f"/videos/{mine}").status_code == 404
            assert [one["id"] for one in ann.get("/videos").json()["data"]] == [mine]
            nobodys = nobody.post("/videos", json={"prompt": "a kite", **SHORT}).json()["id"]
            assert bob.get(f"/videos/{nobodys}").status_code == 200
        status = server.client.predict(job_id=mine, owner="ann", api_name="/status")
        assert status["job_id"] == mine, "the same owner as in the page's API"
    finally:
        server.close()


def test_a_key_that_is_sent_counts_before_a_cookie(tmp_path: Path) -> None:
    server = Server(tmp_path, auth=[("ann", "secret")], item_s=0.001, keys=(ANN,))
    try:
        with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as browser, raw(server) as ann:
            browser.post("login", data={"username": "ann", "password": "secret"})
            asked_for = {"prompt": "a kite", **SHORT}
            with_key = browser.post("v1/videos", json=asked_for, headers={"Authorization": f"Bearer {ANN}"}).json()["id"]
            by_login = browser.post("v1/videos", json=asked_for).json()["id"]
            assert [one["id"] for one in ann.get("/videos").json()["data"]] == [with_key]
            assert [one["id"] for one in browser.get("v1/videos").json()["data"]] == [by_login]
            assert browser.get("v1/videos", headers={"Authorization": f"Bearer {OTHER}"}).status_code == 401
    finally:
        server.close()


def test_behind_a_login(tmp_path: Path) -> None:
    server = Server(tmp_path, auth=[("ann", "secret")], item_s=0.001)
    try:
        with raw(server, "ann") as client:
            answer = client.get("/videos")
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
        with httpx.Client(base_url=server.url) as browser:
            browser.post("login", data={"username": "ann", "password": "secret"})
            assert browser.get("v1/videos").json()["data"] == []
    finally:
        server.close()


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "prompt is missing"), ({"prompt": " "}, "prompt", "empty"), ({"prompt": 7}, "prompt", "not a text"),
        ({"prompt": "x", "height": 33}, "height", "not divisible"), ({"prompt": "x", "seconds": "long"}, "seconds", "long"),
        ({"prompt": "x", "seconds": 1000}, "seconds", "limit of"), ({"prompt": "x", "size": "big"}, "size", "832x480"),
        ({"prompt": "x", "size": "64x64", "width": 64}, "size", "one of them"), ({"prompt": "x", "n": 2}, "n", "not a field"),
        ({"prompt": "x", "model": "sora-2"}, "model", "pocket"), ({"prompt": "x", "preset": "none"}, "preset", "pocket"),
        ({"prompt": "x", "start_image": "/etc/passwd"}, "start_image", "input_reference"),
        ({"prompt": "x", "input_reference": "http://127.0.0.1:1/x.png"}, "input_reference", "fetches"),
        ({"prompt": "x", "input_reference": {"file_id": "file-1"}}, "input_reference", "fetches"),
        ({"prompt": "x", "input_reference": "data:image/png;base64,eA=="}, "start_image", "neither PNG"),
    ],
)  # fmt: skip
def test_bad_values(server: Server, body: dict[str, Any], param: str, says: str) -> None:
    with raw(server) as client:
        answer = client.post("/videos", json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and says in error["message"] and error["type"] == "invalid_request_error"


def test_bad_bodies(server: Server) -> None:
    with raw(server) as client:
        for body in (b"", b"{", b"[]", b"7", b'"x"', b"\xff", b"[" * 60_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
            assert client.post("/videos", content=body).status_code == 400
        long = client.post("/videos", content=b"x" * (MAX_CALL_BYTES + 1))
        assert long.status_code == 413 and error_of(long)["code"] == "too_large"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        for form in (b"", b"x", b"--x\r\n\r\n", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na kite'):
            assert client.post("/videos", content=form, headers=kind).status_code == 400
        assert client.post("/videos", content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
        twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
        assert client.post("/videos", files=twice).status_code == 400
        for files in ({"video": b"x"}, {"input_reference": b"no picture"}, {"prompt": b"x"}):
            assert client.post("/videos", data={"prompt": "x"} if "prompt" not in files else {}, files=files).status_code == 400
        much = {"prompt": "x", **{f"f{n}": "x" * 20_000 for n in range(4)}}
        assert client.post("/videos", files={k: (None, v) for k, v in much.items()}).status_code == 413
    assert [path.name for path in Path(get_upload_folder()).glob("v1-*")] == []


def test_addresses_that_are_none(server: Server) -> None:
    with raw(server) as client:
        for path in ("", "/", "/nothing", "/videos/", "/videos/abcdef", "/videos/..%2f..%2fetc", "/videos/x/content"):
            answer = client.get(path)
            assert answer.status_code == 404 and error_of(answer)["code"] in ("unknown_url", "video_not_found"), path
        assert error_of(client.put("/videos"))["code"] == "method_not_allowed"
        for query in ({"limit": 0}, {"limit": "x"}, {"limit": 101}, {"order": "up"}):
            assert client.get("/videos", params=query).status_code == 400
        assert client.post("/videos", json={"prompt": "x"}, headers={"Origin": "https://evil.example"}).status_code == 403


def test_the_queue_and_the_owners_limit(slow: Server) -> None:
    started(slow)
    with raw(slow) as client:
        codes = [client.post("/videos", json={"prompt": "a kite", **SHORT}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        answer = client.post("/videos", json={"prompt": "a kite", **SHORT})
        assert error_of(answer)["type"] == "rate_limit_error" and answer.headers["retry-after"]
    with pytest.raises(openai.RateLimitError):
        client_of(slow).videos.create(prompt="a kite")


def test_few_pictures_are_taken_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_num_forms", asked.MAX_AT_ONCE)
    with raw(server) as client:
        answer = client.post("/videos", files={"prompt": (None, "x")})
        assert answer.status_code == 503 and error_of(answer)["code"] == "busy" and answer.headers["retry-after"]


# Keys


def test_where_keys_come_from(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{ANN}\n\n  {BOB}\n")
    assert read_keys([OTHER, f"@{tmp_path}/keys"], f"{ANN}, {'z' * 16}\n") == (OTHER, ANN, BOB, "z" * 16)
    assert read_keys([], None) == read_keys([], "") == ()
    for given in (["short"], ["with blanks in the key"], ["x" * 201], ["ключ-ключ-ключ-ключ"]):
        with pytest.raises(RequestError, match="number 1 is not usable") as caught:
            read_keys(given)
        assert given[0] not in str(caught.value)
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys([f"@{tmp_path}/none"])


def test_the_openapi_document(server: Server) -> None:
    with raw(server, None) as client:
        document = client.get("/openapi.json").json()
        page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(f"<code>{path}</code>" in page.text for path in document["paths"]) and "negative_prompt" in page.text
    assert document["openapi"].startswith("3.1")
    assert {"get", "delete"} <= set(document["paths"]["/v1/videos/{video_id}"])
    fields = document["components"]["schemas"]["CreateVideo"]["properties"]
    assert {"prompt", "seconds", "size", "seed", "input_reference", "negative_prompt", "shots"} <= set(fields)
    assert "start_image" not in fields and all(field.get("description") for name, field in fields.items() if name != "prompt")
    text = json.dumps(document)
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert name in document["components"]["schemas"]
    for path in document["paths"].values():
        assert all(operation["description"] for operation in path.values())
