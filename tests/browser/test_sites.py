"""Two sites behind TLS in a real browser: a sibling that wants what a login's cookie opens, and the frame of a Space.

The names are made up and lead here; the certificate is made on the spot.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dualparal.ui.http.sites import Sites
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server, tidy_up

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
DEADLINE_MS = 240_000
STUDIO, SIBLING = "studio.films.test", "cats.films.test"
SPACE, HUB = "me-studio.hf.space", "huggingface.co"
pytestmark = [
    *GRADIO_WARNINGS,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium (apt-get install chromium)"),
]


def proxy_to(url: str) -> ASGIApp:
    """What an operator puts in front: ends TLS, keeps the host, says which scheme it was."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        headers = [(k, v) for k, v in request.headers.raw if k != b"connection"] + [(b"x-forwarded-proto", b"https")]
        path = httpx.URL(path=scope["path"], query=scope["query_string"])
        client = httpx.AsyncClient(base_url=url, timeout=DEADLINE_S)
        asked = client.build_request(request.method, path, headers=headers, content=await request.body())
        try:
            found = await client.send(asked, stream=True)
        except httpx.HTTPError:  # it is ending
            await client.aclose()
            await JSONResponse({}, status_code=502)(scope, receive, send)
            return

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in found.aiter_raw():
                    yield piece
            except httpx.HTTPError:  # it is ending
                return
            finally:
                await found.aclose()
                await client.aclose()

        answer = StreamingResponse(pieces(), status_code=found.status_code)
        answer.raw_headers = found.headers.raw
        await answer(scope, receive, send)

    return app


def page_of(html: str) -> ASGIApp:
    """A site of one page; as the hub it also says that a Space is running."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            reported = {"id": "me/studio", "host": f"https://{SPACE}", "runtime": {"stage": "RUNNING"}}
            api = JSONResponse(reported, headers={"Access-Control-Allow-Origin": "*"})
            await (HTMLResponse(html) if scope["path"] == "/" else api)(scope, receive, send)

    return app


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def serve(authority: trustme.CA) -> Iterator[Any]:
    """Serves an application under a name with TLS; gives its port."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: ASGIApp, name: str) -> int:
        held = socket.socket()
        held.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        config.load()
        config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(config.ssl)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([held],), daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + DEADLINE_S
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return held.getsockname()[1]

    yield start
    for server, _ in running:
        server.should_exit = True
    for server, thread in running:
        thread.join(5.0)
        server.force_exit = True
        thread.join()
    tidy_up()


@pytest.fixture
def open_page() -> Iterator[Any]:
    """A page of a new browser, to which each name is a server here, as `serve` started it."""
    with playwright.sync_playwright() as driver:

        def opened(ports: dict[str, int]) -> Any:
            names = ", ".join(f"MAP {name} 127.0.0.1:{port}" for name, port in ports.items())
            flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", f"--host-resolver-rules={names}"]
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_context(ignore_https_errors=True).new_page()
            page.set_default_timeout(DEADLINE_MS)
            return page

        yield opened


def log_in(page: Any, url: str) -> None:
    page.goto(url)
    page.fill("input[type=text], input[autocomplete=username]", "ann")
    page.fill("input[type=password]", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#generate")
    page.wait_for_selector(".estimate b")


ATTACK = """async ([url, video]) => {
  const told = {};
  const ask = async (name, path, options) => {
    try { told[name] = (await fetch(url + path, {credentials: 'include', ...options})).status; }
    catch (error) { told[name] = 'no answer'; }
  };
  await ask('config', '/config', {});
  const submit = JSON.stringify({data: ['a stolen kite']});
  await ask('submit', '/gradio_api/call/submit', {method: 'POST', body: submit, headers: {'Content-Type': 'application/json'}});
  await ask('blind submit', '/gradio_api/call/submit', {method: 'POST', body: submit, mode: 'no-cors'});
  await ask('blind video', video, {mode: 'no-cors'});
  told.player = await new Promise((done) => {
    const player = document.createElement('video');
    player.onloadeddata = () => done('plays');
    player.onerror = () => done('refused');
    player.src = url + video;
  });
  return told;
}"""


def test_a_sibling_gets_nothing_of_what_a_login_opens(open_page: Any, serve: Any, tmp_path: Path) -> None:
    made = Server(tmp_path / "outputs", auth=[("ann", "secret")], sites=Sites.of([STUDIO]), item_s=0.0)
    try:
        url, sibling = f"https://{STUDIO}", page_of(f"<h1>cats</h1><iframe src='https://{STUDIO}'></iframe>")
        page = open_page({STUDIO: serve(proxy_to(made.url), STUDIO), SIBLING: serve(sibling, SIBLING)})
        log_in(page, url)
        cookies = [cookie for cookie in page.context.cookies(url) if cookie["name"].startswith("access-token")]
        assert cookies and all(cookie["secure"] and cookie["sameSite"] == "Lax" for cookie in cookies)
        page.fill("#prompt textarea", "a kite")
        page.click("#generate")
        page.wait_for_selector(".board.finished", state="attached")
        video = next(tmp_path.rglob("video.mp4"))
        jobs = len(list((tmp_path / "outputs").iterdir()))
        path = f"/gradio_api/file={video}"
        assert page.evaluate(f"async () => (await fetch('{path}')).status") == 200, "it is there for the login"

        cats = page.context.new_page()
        cats.goto(f"https://{SIBLING}")
        reported = cats.evaluate(ATTACK, [url, path])
        assert reported["config"] == reported["submit"] == "no answer" and reported["player"] == "refused", reported
        assert len(list((tmp_path / "outputs").iterdir())) == jobs, "another site has made a job"
        frame = cats.frames[1]
        assert frame.locator("#generate").count() == 0 and "films.test" not in frame.evaluate("location.href")

        cats.goto(url)  # a link to the page works all the same
        cats.wait_for_selector("#generate")
        page.context.browser.close()
    finally:
        made.close()


def test_a_space_works_in_the_frame_that_shows_it(open_page: Any, serve: Any, tmp_path: Path) -> None:
    made = Server(tmp_path / "outputs", sites=Sites.of(space_host=SPACE), item_s=0.0)
    try:
        hub = page_of(f"<iframe src='https://{SPACE}' width=1300 height=900></iframe>")
        page = open_page({SPACE: serve(proxy_to(made.url), SPACE), HUB: serve(hub, HUB)})
        page.goto(f"https://{HUB}")
        frame = page.frame_locator("iframe")
        frame.locator(".estimate b").first.wait_for()
        frame.locator("#prompt textarea").fill("a kite")
        frame.locator("#generate").click()
        frame.locator(".board.finished").wait_for(state="attached")
        page.context.browser.close()
    finally:
        made.close()
