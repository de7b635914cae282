"""What every server of ours is put behind, and how Gradio, which sets its server up by itself, is made to use it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gradio.http_server
import gradio.networking
import gradio.route_utils
import gradio.routes
import uvicorn.config
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dualparal.ui.guard import Guard
from dualparal.ui.http.bodies import BodiesMiddleware, Uploads
from dualparal.ui.http.connections import patient_server
from dualparal.ui.http.files import WholeFileResponse
from dualparal.ui.http.logins import LoginsMiddleware
from dualparal.ui.http.mcp import McpMiddleware
from dualparal.ui.http.sessions import TabsMiddleware
from dualparal.ui.http.sites import Sites, SitesMiddleware


def layers(
    sites: Sites, uploads: Uploads | None = None, may_use_tools: Callable[[Request], object] = lambda _: None
) -> list[Middleware]:
    """From the outside in: who may speak, how much, how often a password is tried, and faults as one sentence."""
    return [
        Middleware(SitesMiddleware, sites=sites), Middleware(BodiesMiddleware, uploads=uploads), Middleware(LoginsMiddleware),
        Middleware(McpMiddleware, check=may_use_tools),
        Middleware(TabsMiddleware), Middleware(Guard),
    ]  # fmt: skip


class _NoCors:
    """In place of Gradio's answer to other sites, which gives any of them credentials where the server has a name."""

    def __init__(self, app: ASGIApp, **_: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


@contextlib.contextmanager
def own_server() -> Iterator[None]:
    """A page launched inside answers other sites by `Sites` alone, has `PatientProtocol`, logs as the process does, and watches
    no source for changes. Files are sent by `WholeFileResponse`, from then on: Gradio looks it up with each request."""
    gradio.route_utils.FileResponse = WholeFileResponse
    http, loggers = gradio.http_server, uvicorn.config.LOGGING_CONFIG["loggers"]
    networking = gradio.networking
    before = gradio.routes.CustomCORSMiddleware, http.LOCALHOST_NAME, http.get_space, networking.url_ok
    gradio.routes.CustomCORSMiddleware = _NoCors
    http.LOCALHOST_NAME = "127.0.0.1"  # where it looks whether a port is free; it cannot at an IPv6 address
    http.get_space = lambda: None  # else a thread looks for the package that a Space changes its code with
    networking.url_ok = lambda _: True  # it gives up where a busy machine has not answered within 3 s
    uvicorn.config.LOGGING_CONFIG["loggers"] = {}  # uvicorn's own write lines of their own form
    try:
        with patient_server():
            yield
    finally:
        gradio.routes.CustomCORSMiddleware, http.LOCALHOST_NAME, http.get_space, networking.url_ok = before
        uvicorn.config.LOGGING_CONFIG["loggers"] = loggers
