"""One route below `/v1`, and how all of them answer: whatever goes wrong is a refusal in OpenAI's form."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from dualparal.errors import DualParalError
from dualparal.ui.http.refusals import Refusal, refusal_of, refused

log = logging.getLogger(__name__)
SENTENCES = {404: "there is nothing at this address; /v1/docs lists all", 405: "this method does not go with this address"}
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Door:
    """One route: its path below `/v1`, its method, what it answers with, its query's parameters by name, the body it takes."""

    method: str
    path: str
    call: Endpoint
    gives: str
    query: Mapping[str, str] = field(default_factory=dict)
    takes: str = ""  # a schema of `openapi`
    is_open: bool = False  # needs no key

    @property
    def about(self) -> str:
        """What it does, as its function's docstring says."""
        return " ".join((inspect.getdoc(self.call) or "").split())


class Answers:
    """The ASGI application below `/v1`."""

    def __init__(self, doors: Iterable[Door]) -> None:
        routes = [Route(door.path, _answering(door.call), methods=[door.method]) for door in doors]
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            sentence = SENTENCES.get(error.status_code, str(error.detail))
            code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
            await refused(error.status_code, sentence, code, headers=error.headers)(scope, receive, send)


def _answering(call: Endpoint) -> Endpoint:
    """`call`, whose errors become answers of one sentence."""

    async def answer(request: Request) -> Response:
        try:
            return await call(request)
        except Refusal as refusal:
            return refusal.answer()
        except DualParalError as error:
            return refusal_of(error).answer()
        except ClientDisconnect:
            return refused(400, "the body broke off", "invalid_request")
        except OSError as error:
            log.warning("a call of %s failed: %s", request.url.path[:100], error)
            return refused(503, f"a file could not be read or written: {error.strerror}", "no_storage")

    return answer
