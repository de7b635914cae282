"""Refusals in the form that a route's callers read: below `/v1` OpenAI's, {"error": {"message", "type", "code", "param"}}, and
FastAPI's, {"detail"}, elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from dualparal.errors import DualParalError, EngineError, OutputError, QueueFull, RequestError
from dualparal.ui.words import without_paths

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {403: "not_allowed", 404: "unknown_url", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}
RETRY_S = "5"


class Refusal(Exception):
    """An answer other than the one asked for. `param`: the field at fault."""

    def __init__(
        self, status: int, sentence: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def answer(self) -> JSONResponse:
        return refused(self.status, str(self), self.code, param=self.param, headers=self.headers)


def refused(
    status: int, sentence: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer that refuses with `sentence`."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": sentence, "type": kind, "code": code, "param": param}
    return JSONResponse({"error": error}, status_code=status, headers=dict(headers or {}))


def not_found(job_id: str) -> Refusal:
    """There is no such video, or it is somebody else's."""
    shown = job_id if len(job_id) <= 40 and job_id.isprintable() else "of that name"
    return Refusal(404, f"there is no video {shown} here", "video_not_found", param="video_id")


def refusal_of(error: DualParalError) -> Refusal:
    """What an error of the engine is in HTTP's words."""
    sentence = without_paths(error)
    match error:
        case QueueFull():
            return Refusal(429, sentence, "queue_full", headers={"Retry-After": RETRY_S})
        case RequestError():
            return Refusal(400, sentence, "invalid_value", param=error.field)
        case OutputError():
            return Refusal(503, sentence, "no_storage", headers={"Retry-After": RETRY_S})
        case EngineError():
            return Refusal(503, sentence, "engine_unavailable", headers={"Retry-After": RETRY_S})
    return Refusal(500, sentence, "server_error")


def refusal_at(path: str, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that refuses with `sentence` before any route is asked."""
    if path.startswith("/v1/"):
        return refused(status, sentence, CODES.get(status, "server_error"), headers=headers)
    return JSONResponse({"detail": sentence}, status_code=status, headers=dict(headers or {}))
