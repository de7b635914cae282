"""What Gradio's own routes leave uncaught becomes one sentence: a request that no endpoint can read, or a fault of ours.

Without it such a request is answered "Internal Server Error" and fills the log with a traceback per attempt.
"""

from __future__ import annotations

import logging

from fastapi.exception_handlers import http_exception_handler
from gradio.route_utils import FnIndexInferError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualparal.ui.http.refusals import refusal_at

log = logging.getLogger(__name__)
UNREADABLE = (TypeError, KeyError, ValueError, AttributeError, IndexError, RecursionError, AssertionError, FnIndexInferError)


NO_FILE = {"detail": "there is no such file here; it may have been deleted"}
UNFIT = {"detail": "this request fits no endpoint; /gradio_api/info lists them"}


async def unfit(_: Request, __: Exception) -> JSONResponse:
    """The answer to a body of the wrong form; FastAPI's own repeats all of it."""
    return JSONResponse(UNFIT, status_code=422)


async def refused(request: Request, error: Exception) -> Response:
    """The answer to what is refused; of a file Gradio's own repeats the whole path, which is the server's business."""
    assert isinstance(error, HTTPException)
    if "/file=" in request.url.path and error.status_code in (403, 404):
        return JSONResponse(NO_FILE, status_code=error.status_code)
    if request.url.path.startswith("/v1/"):  # what no route there takes, such as a line end in an address
        return refusal_at(request.url.path, error.status_code, str(error.detail), error.headers)
    return await http_exception_handler(request, error)


class CutShort(Exception):
    """What is being sent cannot be gone on with: the connection ends there, and whoever listens sees that some is missing."""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except HTTPException:
            raise
        except CutShort as error:
            log.info("an answer to %r was cut short: %s", scope["path"][:100], error)
        except Exception as error:
            if scope["type"] != "http" or (has_begun and not isinstance(error.__cause__, HTTPException)):
                raise
            if has_begun:  # an event stream that has just said that there is no such session
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await self._refuse(scope, error)(scope, receive, send)

    def _refuse(self, scope: Scope, error: Exception) -> JSONResponse:
        name = type(error).__name__
        if isinstance(error, UNREADABLE) and "/gradio_api/" in scope["path"]:
            log.info("a request to %r could not be read: %s", scope["path"][:100], name)
            return JSONResponse(UNFIT, status_code=400)
        log.error("a request to %r failed", scope["path"][:100], exc_info=error)
        return refusal_at(scope["path"], 500, "something went wrong inside the server; its log has the details")
