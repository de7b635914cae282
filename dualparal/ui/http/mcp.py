"""`--mcp`: the page's API as tools of the Model Context Protocol, at /gradio_api/mcp, which Gradio serves.

Gradio calls its own API over the loopback for each tool, with the headers of the call. What that would lose is put right here:
the address that a call came from, so that limits per address hold, and its bearer token, the owner where a tool is given none.
`/generate` is no tool: each call of it would hold two of the server's threads until the video is done.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import gradio as gr
import gradio.mcp
from gradio.utils import get_upload_folder
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dualparal.errors import RequestError
from dualparal.ui.http.refusals import Refusal, refusal_at

PATH = "/gradio_api/mcp"
NO_TOOLS = ("generate",)
MARK = "x-gradio-user"  # Gradio sets it to "mcp" in calls that a tool has made
FORWARDED = (b"x-forwarded-for", b"forwarded", MARK.encode())


def check_can_serve(*, has_logins: bool) -> None:
    """Raise `RequestError` where tools cannot be served."""
    if importlib.util.find_spec("mcp") is None:
        raise RequestError("--mcp needs the package mcp; pip install 'mcp>=1.30,<2'", "mcp")
    if has_logins:
        raise RequestError("--mcp and --auth do not go together: tools have no logins; use --api_key", "mcp")


def set_up(page: gr.Blocks) -> None:
    """Leave out what is no tool, after `page` has been launched, and put what tools are sent among the uploads."""
    gradio.mcp.DEFAULT_TEMP_DIR = str(get_upload_folder())
    tools: dict[str, str] = page.mcp_server_obj.tool_to_endpoint
    for name in [name for name, endpoint in tools.items() if endpoint.lstrip("/") in NO_TOOLS]:
        del tools[name]


class McpMiddleware:
    """ASGI middleware around Gradio's MCP routes. `check` is given each request and raises `Refusal` where a key is missing."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], object]) -> None:
        self._app, self._check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == PATH or path.startswith(f"{PATH}/")):
            await self._app(scope, receive, send)
            return
        if path.rstrip("/") not in (PATH, f"{PATH}/http"):  # an older transport, which keeps a stream open for each client
            await refusal_at(path, 404, f"tools are served at {PATH} alone")(scope, receive, send)
            return
        try:
            self._check(Request(scope))
        except Refusal as refusal:
            await refusal_at(path, refusal.status, str(refusal), refusal.headers)(scope, receive, send)
            return
        address = (scope.get("client") or ("", 0))[0]
        headers = [pair for pair in scope["headers"] if pair[0].lower() not in FORWARDED]
        headers.append((b"x-forwarded-for", address.encode("latin-1", "replace")))
        await self._app({**scope, "headers": headers}, receive, send)


def bearer_of(http: Any) -> str:
    """The bearer token that an MCP client has sent with the call that `http`, a `gr.Request`, is of; '' for other calls."""
    headers = getattr(http, "headers", None) or {}
    if headers.get(MARK) != "mcp":
        return ""
    kind, _, token = str(headers.get("authorization", "")).partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""
