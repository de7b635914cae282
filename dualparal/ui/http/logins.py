"""Nothing but the login page before a login, and guessing passwords slowed: after a few wrong ones an address, and a name, have
to wait, longer each time.

Gradio asks for the login on some of its routes; heartbeats, streams and cancels are open to whoever knows an id.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
FREE_TRIES = 5
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = {"address": 900.0, "user": 10.0}  # who guesses waits long; who is guessed at shall not be locked out
FORGET_AFTER_S = 3600.0
MAX_REMEMBERED = 10_000
IN_FORM = re.compile(rb'name="username"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n', re.DOTALL)


@dataclass
class _Tries:
    num_wrong: int = 0
    last_s: float = 0.0

    def wait_s(self, now_s: float, longest_s: float) -> float:
        """Seconds until the next try is listened to."""
        if self.num_wrong < FREE_TRIES:
            return 0.0
        pause_s = min(longest_s, FIRST_WAIT_S * 2.0 ** min(self.num_wrong - FREE_TRIES, 20))
        return max(0.0, self.last_s + pause_s - now_s)


class Attempts:
    """Wrong logins by address, and by name whatever the address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: OrderedDict[tuple[str, str], _Tries] = OrderedDict()

    def wait_s(self, address: str, user: str) -> float:
        """Seconds that this address has to wait before it may try that name."""
        now_s = self._clock()
        known = [(key[0], self._tries[key]) for key in _keys(address, user) if key in self._tries]
        return max((tries.wait_s(now_s, LONGEST_WAIT_S[kind]) for kind, tries in known), default=0.0)

    def wrong(self, address: str, user: str) -> int:
        """Count a wrong password; the address's wrong ones so far."""
        now_s = self._clock()
        for key in _keys(address, user):
            tries = self._tries.pop(key, _Tries())
            if now_s - tries.last_s > FORGET_AFTER_S:
                tries.num_wrong = 0
            tries.num_wrong, tries.last_s = tries.num_wrong + 1, now_s
            self._tries[key] = tries
        while len(self._tries) > MAX_REMEMBERED:
            self._tries.popitem(last=False)
        return self._tries["address", address].num_wrong

    def right(self, address: str, user: str) -> None:
        """Forget what was wrong before the right one."""
        for key in _keys(address, user):
            self._tries.pop(key, None)


def _keys(address: str, user: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("address", address), ("user", user[:200])


def asks_for_login(scope: Scope) -> bool:
    """Whether this server was started with `--auth`."""
    return getattr(scope["app"], "auth", None) is not None


def logged_in(scope: Scope) -> str | None:
    """The name that the request's cookie was given to at a login; None without one."""
    app: Any = scope["app"]
    if getattr(app, "auth", None) is None:
        return None
    cookies = HTTPConnection(scope).cookies
    names = (app.tokens.get(cookies.get(f"access-token{kind}-{app.cookie_id}")) for kind in ("", "-unsecure"))
    return next((str(name) for name in names if name is not None), None)


class LoginsMiddleware:
    """ASGI middleware around Gradio's routes and its `/login`. Wants the body in one message (`BodiesMiddleware`)."""

    def __init__(self, app: ASGIApp, attempts: Attempts | None = None) -> None:
        self._app, self._attempts = app, attempts or Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login"):
            await self._log_in(scope, receive, send)
        elif scope["type"] == "http" and "/gradio_api/" in scope["path"] and not self._may_enter(scope):
            await JSONResponse({"detail": "log in first"}, status_code=401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        return not asks_for_login(scope) or scope["path"].endswith("/startup-events") or logged_in(scope) is not None

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            body += messages[-1].get("body", b"")
        left = iter(messages)
        address, user = (scope.get("client") or ("", 0))[0], _user_of(body)

        async def replayed() -> Message:
            message = next(left, None)
            return message if message is not None else await receive()

        async def judging_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 200:
                    self._attempts.right(address, user)
                elif message["status"] in (400, 401):
                    num_wrong = self._attempts.wrong(address, user)
                    log.warning("login of %s from %s refused, try %d", ascii(user[:60]), address, num_wrong)
            await send(message)

        if (wait_s := self._attempts.wait_s(address, user)) > 0:
            log.warning("login of %s from %s not listened to: too many tries", ascii(user[:60]), address)
            sentence = {"detail": f"too many wrong logins; try again in {wait_s:.0f} seconds"}
            headers = {"Retry-After": str(int(wait_s) + 1)}
            await JSONResponse(sentence, status_code=429, headers=headers)(scope, replayed, send)
            return
        await self._app(scope, replayed, judging_send)


def _user_of(body: bytes) -> str:
    if (found := IN_FORM.search(body)) is not None:
        return found[1].decode("utf-8", "replace").strip()
    return parse_qs(body.decode("utf-8", "replace"), max_num_fields=20).get("username", [""])[0].strip() if body else ""
