"""Who may speak, how much, how fast: each layer alone, around an application that says what reached it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualparal.errors import RequestError
from dualparal.ui.http import bodies, connections, logins
from dualparal.ui.http.bodies import MAX_CALL_BYTES, MAX_PICTURE_BYTES, BodiesMiddleware, Uploads
from dualparal.ui.http.logins import FREE_TRIES, Attempts, LoginsMiddleware
from dualparal.ui.http.sites import Sites, SitesMiddleware

HERE = "http://127.0.0.1:7860"


async def tells(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes that came, and two cookies."""
    body = await Request(scope, receive).body()
    answer = JSONResponse({"bytes": len(body)})
    answer.set_cookie("a", "1", samesite="none", secure=True, httponly=True)
    answer.set_cookie("b", "2")
    await answer(scope, receive, send)


def call(app: ASGIApp, path: str = "/x", *, base: str = HERE, method: str = "GET", **more: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


# Sites


@pytest.mark.parametrize(
    ("host", "hosts", "listens_at", "is_known"),
    [
        ("127.0.0.1:7860", (), "127.0.0.1", True), ("localhost", (), "127.0.0.1", True), ("[::1]:7860", (), "::1", True),
        ("LOCALHOST.:80", (), "127.0.0.1", True), ("evil.example", (), "127.0.0.1", False), ("", (), "127.0.0.1", False),
        ("192.168.1.5:7860", (), "127.0.0.1", False), ("192.168.1.5:7860", (), "0.0.0.0", True),
        ("[fd00::5]:7860", (), "::", True), ("evil.example", (), "0.0.0.0", False),
        ("studio.example.org", ("Studio.Example.org",), "0.0.0.0", True), ("evil.example", ("a.org",), "0.0.0.0", False),
        ("evil.example", ("*",), "127.0.0.1", True), ("a@127.0.0.1", (), "127.0.0.1", False), ("127.0.0.1:x", (), "::1", False),
        ("127.0.0.1.evil.example", (), "127.0.0.1", False),
    ],
)  # fmt: skip
def test_names_that_a_server_answers_to(host: str, hosts: tuple[str, ...], listens_at: str, is_known: bool) -> None:
    assert Sites.of(hosts, listens_at=listens_at).answers_to(host) is is_known


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({}, True),  # a program
        ({"sec-fetch-site": "same-origin"}, True), ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),  # a link
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, False),  # a sibling's <video src>
        ({"origin": "https://studio.example.org"}, True), ({"origin": "http://studio.example.org"}, False),
        ({"origin": "https://other.example.org"}, False), ({"origin": "https://studio.example.org:8443"}, False),
        ({"origin": "null"}, False), ({"origin": "https://friend.example"}, True),
        ({"origin": "https://other.example.org", "sec-fetch-site": "same-origin"}, False),
    ],
)  # fmt: skip
def test_sites_that_may_call(headers: dict[str, str], may: bool) -> None:
    sites = Sites.of(["studio.example.org"], ["https://friend.example"])
    assert sites.may_call(Headers({"host": "studio.example.org", **headers}), "https") is may


def test_another_site_reaches_nothing_and_gets_no_credentials() -> None:
    app = SitesMiddleware(tells, Sites.of())
    refused = call(app, method="POST", headers={"Origin": "https://evil.example"}, json={})
    assert refused.status_code == 403 and "--allowed_origins" in refused.json()["detail"]
    assert "access-control-allow-origin" not in refused.headers
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert call(app, method="OPTIONS", headers=asked).status_code == 403
    assert call(app, headers={"Host": "evil.example"}).status_code == 403
    assert call(app, "/healthz", headers={"Host": "10.0.0.7"}).status_code == 200


def test_an_allowed_site_gets_its_answer() -> None:
    app = SitesMiddleware(tells, Sites.of(origins=["https://Friend.example/"]))
    asked = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    before = call(app, method="OPTIONS", headers={**asked, "Access-Control-Request-Headers": "content-type"})
    assert before.status_code == 204 and before.headers["access-control-allow-headers"] == "content-type"
    found = call(app, method="POST", headers={"Origin": "https://friend.example"}, json={})
    assert found.headers["access-control-allow-origin"] == "https://friend.example"
    assert found.headers["access-control-allow-credentials"] == "true" and "Origin" in found.headers["vary"]


@pytest.mark.parametrize(
    ("proto", "space", "kept"),
    [
        ("http", None, ["a=1; HttpOnly; Path=/; SameSite=Lax", "b=2; Path=/; SameSite=Lax"]),
        ("https", None, ["a=1; HttpOnly; Path=/; Secure; SameSite=Lax", "b=2; Path=/; Secure; SameSite=Lax"]),
        ("https", "me-studio.hf.space", ["a=1; HttpOnly; Path=/; Secure; SameSite=None", "b=2; Path=/; Secure; SameSite=None"]),
    ],
)
def test_cookies_and_frames(proto: str, space: str | None, kept: list[str]) -> None:
    app = SitesMiddleware(tells, Sites.of(space_host=space))
    found = call(app, headers={"X-Forwarded-Proto": proto})
    assert found.headers.get_list("set-cookie") == kept
    assert found.headers["x-content-type-options"] == "nosniff"
    policy = found.headers["content-security-policy"]
    assert ("frame-ancestors 'self' https://huggingface.co" in policy) == (space is not None)
    assert space is not None or policy.endswith("frame-ancestors 'self'")


@pytest.mark.parametrize("origin", ["example.org", "https://", "ftp://example.org", "https://example.org/path", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(RequestError, match="allowed_origins"):
        Sites.of(origins=[origin])


@pytest.mark.parametrize("host", ["https://example.org", "example.org:80", "a/b", ""])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(RequestError, match="allowed_hosts"):
        Sites.of([host])


@pytest.mark.parametrize("path", ["/gradio_api/file=http://127.0.0.1:1/x", "/gradio_api/proxy=http://127.0.0.1:1/"])
def test_nobody_is_fetched_or_sent_elsewhere(path: str) -> None:
    assert call(SitesMiddleware(tells, Sites.of()), path).status_code == 403


# Bodies


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_CALL_BYTES])
def test_a_body_within_the_limit_arrives_whole(num_bytes: int) -> None:
    assert call(BodiesMiddleware(tells), method="POST", content=b"x" * num_bytes).json() == {"bytes": num_bytes}


def in_pieces(num_bytes: int) -> Any:
    async def pieces() -> Any:
        for start in range(0, num_bytes, 1000):
            yield b"x" * min(1000, num_bytes - start)

    return pieces()


@pytest.mark.parametrize("content", [b"x" * (MAX_CALL_BYTES + 1), MAX_CALL_BYTES + 1])
def test_a_long_body_is_refused_before_anything_reads_it(content: bytes | int) -> None:
    sent = content if isinstance(content, bytes) else in_pieces(content)
    found = call(BodiesMiddleware(fails), method="POST", content=sent)
    assert found.status_code == 413 and "64,000 bytes" in found.json()["detail"]


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("this should not have been reached")


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def silent() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/x", "method": "POST", "headers": [(b"content-length", b"5")]}
    asyncio.run(BodiesMiddleware(fails, timeout_s=0.05)(scope, silent, send))
    assert sent[0]["status"] == 408


def test_uploads_count_against_what_they_may_take(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", max_bytes=1000)
    app = BodiesMiddleware(tells, uploads)
    assert call(app, "/gradio_api/upload", method="POST", content=b"x" * 1000).json() == {"bytes": 1000}
    (tmp_path / "uploads" / "a").mkdir(parents=True)
    (tmp_path / "uploads" / "a" / "broken off").write_bytes(b"x" * 400)
    assert call(app, "/gradio_api/upload", method="POST", content=b"x" * 600).json() == {"bytes": 600}
    assert call(app, "/gradio_api/upload", method="POST", content=b"x" * 601).status_code == 413
    assert call(app, "/gradio_api/upload", method="POST", content=in_pieces(601)).status_code == 413
    os.utime(tmp_path / "uploads" / "a", (0, 0))
    assert call(app, "/gradio_api/upload", method="POST", content=b"x" * 1000).status_code == 200, "old ones go"
    (tmp_path / "uploads" / "b").write_bytes(b"x")
    uploads.clean()
    assert list((tmp_path / "uploads").iterdir()) == [], "a server that starts finds none"


def test_only_a_form_for_a_video_may_hold_a_picture() -> None:
    app, form = BodiesMiddleware(tells), {"Content-Type": "multipart/form-data; boundary=x"}
    assert call(app, "/v1/videos", method="POST", content=b"x" * 100_000, headers=form).json() == {"bytes": 100_000}
    for path, headers in (("/v1/videos", {}), ("/v1/videos/abcdef/cancel", form), ("/x", form)):
        assert call(app, path, method="POST", content=b"x" * 100_000, headers=headers).status_code == 413
    announced = {**form, "Content-Length": str(MAX_PICTURE_BYTES + 1)}
    refused = call(app, "/v1/videos", method="POST", content=in_pieces(1), headers=announced)
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "too_large"


# Logins


class Door:
    """An application with one password."""

    def __init__(self) -> None:
        self.now_s, self.num_asked = 0.0, 0
        self.layer = LoginsMiddleware(self, Attempts(lambda: self.now_s))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_asked += 1
        form = await Request(scope, receive).form()
        await JSONResponse({}, status_code=200 if form["password"] == "right" else 400)(scope, receive, send)

    def log_in(self, password: str, user: str = "ann", address: str = "10.0.0.1", is_multipart: bool = False) -> int:
        async def run() -> int:
            transport = httpx.ASGITransport(self.layer, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
                form = {"username": user, "password": password}
                more: dict[str, Any] = {"files": {k: (None, v) for k, v in form.items()}} if is_multipart else {"data": form}
                return (await client.post("/login", **more)).status_code

        return asyncio.run(run())


@pytest.mark.parametrize("is_multipart", [False, True])
def test_guessing_is_slowed_and_logged_without_the_password(is_multipart: bool, caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    with caplog.at_level(logging.WARNING):
        codes = [door.log_in(f"guess{n}", is_multipart=is_multipart) for n in range(FREE_TRIES + 3)]
    assert codes == [400] * FREE_TRIES + [429] * 3 and door.num_asked == FREE_TRIES
    assert "'ann'" in caplog.text and "10.0.0.1" in caplog.text and "guess" not in caplog.text
    assert door.log_in("right", address="10.0.0.2") == 429, "the name waits too"
    door.now_s = 11.0
    assert door.log_in("right", address="10.0.0.2") == 200, "but not long"
    assert door.log_in("right", user="bob", address="10.0.0.3") == 200, "nobody else waits"


def test_the_wait_grows_and_ends() -> None:
    door = Door()
    attempts, waits = Attempts(lambda: door.now_s), []
    for number in range(30):
        attempts.wrong("10.0.0.1", f"user{number}")
        waits.append(attempts.wait_s("10.0.0.1", "x"))
    assert waits[FREE_TRIES - 2] == 0 and waits[FREE_TRIES - 1] == logins.FIRST_WAIT_S and waits[-1] == 900.0
    assert waits == sorted(waits)
    door.now_s = 2 * logins.FORGET_AFTER_S
    attempts.wrong("10.0.0.1", "x")
    assert attempts.wait_s("10.0.0.1", "x") == 0


def test_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "MAX_REMEMBERED", 50)
    attempts = Attempts(lambda: 0.0)
    for number in range(1000):
        attempts.wrong(f"10.0.{number // 250}.{number % 250}", "x")
    assert len(attempts._tries) <= 50


# Connections


@pytest.fixture
def served() -> Iterator[Callable[[], socket.socket]]:
    """A server with the patient protocol; gives new connections to it."""
    import threading

    with connections.patient_server():
        config = uvicorn.Config(tells, port=0, log_level="error", lifespan="off")
        config.load()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(address, timeout=60))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()
    server.should_exit = True
    thread.join()


def test_headers_that_do_not_come_are_given_up(served: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.3)
    silent, slow = served(), served()
    for piece in (b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n"):
        slow.send(piece)
        time.sleep(0.05)
    for one in (silent, slow):
        assert b"408" in one.recv(100)
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 60.0)
    good = served()
    good.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in good.recv(1000)


def test_an_address_holds_so_many_connections(served: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PROXIES", ())
    monkeypatch.setattr(connections, "MAX_PER_ADDRESS", 3)

    def answer() -> tuple[socket.socket, bytes]:
        one = served()
        one.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return one, one.recv(1000)

    held = [answer() for _ in range(3)]
    assert all(b"200 OK" in found for _, found in held)
    assert b"503" in served().recv(100)
    held[0][0].close()
    until = time.monotonic() + 60
    while connections._open.total() >= 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert b"200 OK" in answer()[1]


def test_limits_name_what_they_are() -> None:
    assert bodies.MAX_UPLOAD_BYTES > bodies.MAX_CALL_BYTES > 48_000 + 8_000, "a timeline and both prompts fit"
