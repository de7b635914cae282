"""`--mcp` through the mcp package's own client: which tools there are, what they do, and whose."""

from __future__ import annotations

import ast
import asyncio
import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dualparal.errors import RequestError
from dualparal.ui.http import mcp as ours
from dualparal.ui.http.mcp import NO_TOOLS, PATH, McpMiddleware
from tests.page_server import DEADLINE_S, GRADIO_WARNINGS, Server

pytest.importorskip("mcp")
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client

pytestmark = [*GRADIO_WARNINGS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ANN, BOB = "ann-has-this-key-0001", "bob-has-this-key-0002"
SHORT: dict[str, Any] = {"seconds": 1, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mcp"), item_s=0.001, keys=(ANN, BOB), has_tools=True)
    yield made
    made.close()


def with_session(server: Server, key: str, do: Callable[[ClientSession], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": "10.1.2.3"}
        async with (
            streamablehttp_client(f"{server.url.rstrip('/')}{PATH}/", headers=headers) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await do(session)

    return asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def call(server: Server, tool: str, key: str = ANN, **values: Any) -> Any:
    """A tool's answer: (whether it refused, its text)."""
    found = with_session(server, key, lambda session: session.call_tool(tool, values))
    return bool(found.isError), "\n".join(part.text for part in found.content if part.type == "text")


def told(text: str) -> dict[str, Any]:
    """The status among a tool's texts."""
    found: dict[str, Any] = ast.literal_eval(text[text.index("{") :])
    return found


def test_the_documented_endpoints_are_tools_and_only_those(server: Server) -> None:
    tools = with_session(server, ANN, lambda session: session.list_tools()).tools
    documented = server.client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {tool.name for tool in tools} == {name.lstrip("/") for name in documented} - set(NO_TOOLS)
    submit = next(tool for tool in tools if tool.name == "submit")
    assert "job_id" in submit.description and submit.inputSchema["required"] == ["prompt"]
    assert {"seconds", "seed", "shots"} <= set(submit.inputSchema["properties"])


def test_a_video_by_tools_and_whose_it_is(server: Server) -> None:
    is_refused, text = call(server, "submit", prompt="a kite", seed=7, **SHORT)
    assert not is_refused, text
    job_id = told(text)["job_id"]
    until_s = time.monotonic() + DEADLINE_S
    while (status := told(call(server, "status", job_id=job_id)[1]))["state"] != "finished":
        assert time.monotonic() < until_s
        time.sleep(0.2)
    assert status["settings"]["seed"] == 7
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {ANN}"}) as client:
        assert client.get(f"v1/videos/{job_id}").json()["status"] == "completed", "the key is the owner"
    is_refused, text = call(server, "status", key=BOB, job_id=job_id)
    assert is_refused and f"there is no job {job_id} here" in text
    assert "video.mp4" in call(server, "result", job_id=job_id)[1]
    addresses = {address for address, _ in server.studio.visitors._jobs.values()}
    assert addresses == {"10.1.2.3"}, "what a proxy on this machine names, not that of the loopback"


def test_refusals_are_sentences(server: Server) -> None:
    for tool, values, says in (
        ("submit", {"prompt": " "}, "the prompt is empty"), ("submit", {"prompt": "x", "height": 33}, "not divisible by 16"),
        ("status", {"job_id": "../../etc"}, "a job id is"), ("generate", {"prompt": "x"}, "generate"), ("none", {}, "none"),
    ):  # fmt: skip
        is_refused, text = call(server, tool, **values)
        assert is_refused and says in text and "Traceback" not in text and "site-packages" not in text


def test_nothing_is_fetched_for_a_tool(server: Server) -> None:
    asked: list[str] = []

    class Noting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Noting) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}/x.png"
        is_refused, _ = call(server, "submit", prompt="x", start_image=address, **SHORT)
        other.shutdown()
    assert is_refused and asked == []
    before = set(Path("/tmp/gradio").rglob("*")) if Path("/tmp/gradio").is_dir() else set()
    text = base64.b64encode(b"no picture").decode()
    assert call(server, "submit", prompt="x", start_image=f"data:image/png;base64,{text}", **SHORT)[0]
    assert (set(Path("/tmp/gradio").rglob("*")) if Path("/tmp/gradio").is_dir() else set()) == before


def test_without_a_key_or_elsewhere(server: Server) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Accept": "application/json, text/event-stream"}
    for key, code in ((None, 401), ("nobody-has-this-key-3", 401), (ANN, 200)):
        with httpx.Client(base_url=server.url, headers=headers | ({"Authorization": f"Bearer {key}"} if key else {})) as client:
            assert client.post(f"{PATH.lstrip('/')}/", json=body).status_code == code
            for path in ("/sse", "/messages/?session_id=1", "/schema", "/x"):
                assert client.get(PATH.lstrip("/") + path).status_code == 404
            assert client.post(f"{PATH.lstrip('/')}/", content=b"x" * 70_000).status_code == 413


def test_where_they_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="do not go together"):
        ours.check_can_serve(has_logins=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="needs the package mcp"):
        ours.check_can_serve(has_logins=False)


def test_a_callers_word_for_its_address_is_not_taken() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))

    scope = {
        "type": "http", "path": f"{PATH}/", "client": ("192.0.2.7", 5), "method": "POST",
        "headers": [(b"x-forwarded-for", b"10.0.0.1"), (b"forwarded", b"for=10.0.0.1"),
                    (b"x-gradio-user", b"mcp"), (b"a", b"b")],
    }  # fmt: skip
    asyncio.run(McpMiddleware(app, lambda _: None)(scope, None, None))  # type: ignore[arg-type]
    assert seen == [{b"a": b"b", b"x-forwarded-for": b"192.0.2.7"}]


def test_the_lines_of_the_page(server: Server, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "assistants.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    environment = {**os.environ, "STUDIO": server.url.rstrip("/"), "KEY": ANN}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tools, _, answer = done.stdout.partition("\n")
    assert answer == "False {'job_id'\n"
    table = page.partition("| tool |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) <= set(ast.literal_eval(tools))
    (config,) = re.findall(r"```json\n(.*?)```", page, re.S)
    assert json.loads(config)["mcpServers"]["studio"]["url"].endswith(f"{PATH}/")
