"""Which sites may speak to this server, under which names it answers, and what a browser is told to refuse by itself.

A login's cookie goes with every request that a browser makes to this server, whichever site has asked for it. So a request
that a browser marks as another site's is refused, unless `--allowed_origins` names that site, and a name that nobody gave this
server (DNS rebinding) is not answered. Programs send neither mark; they have no cookies to steal.
Follows the Fetch standard (Origin), Fetch Metadata (Sec-Fetch-*) and CSP 3.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualparal.errors import RequestError
from dualparal.ui.http.refusals import refusal_at

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SPACES_FRAMES = ("https://huggingface.co", "https://*.huggingface.co", "https://*.hf.space")
ANY_HOST_PATHS = ("/healthz", "/readyz")  # platforms probe under names of their own
OTHER_SERVERS = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")  # Gradio goes there, or sends there
# Gradio's page builds functions from text and styles in place; everything else comes from here.
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Names that this server answers under, and other sites that may call it.

    `hosts`: names besides addresses and this machine's own ("*" for any). `origins`: "https://example.org" each ("*" for any
    site, which then gets no credentials' protection). `is_local`: only this machine can reach the server. `is_on_spaces`:
    it runs behind Hugging Face's proxy, which shows it in a frame on another site.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    is_local: bool = False
    is_on_spaces: bool = False
    own_names: frozenset[str] = field(default_factory=lambda: frozenset({*LOCAL_NAMES}))

    @classmethod
    def of(
        cls,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        *,
        listens_at: str = "127.0.0.1",
        space_host: str | None = None,
    ) -> Sites:
        """From what the operator gave; `listens_at` is the server's address, `space_host` the Space's public name if it is one.

        Raises `RequestError` for an origin that is not one, or a host that is more than a name.
        """
        names = {*LOCAL_NAMES, socket.gethostname().lower(), *([space_host.lower()] if space_host else [])}
        given = frozenset(_checked_host(host) for host in hosts)
        return cls(
            hosts=given, origins=frozenset(_checked_origin(origin) for origin in origins), is_on_spaces=space_host is not None,
            is_local=listens_at.strip("[]") in LOCAL_NAMES, own_names=frozenset(names),
        )  # fmt: skip

    def answers_to(self, host: str | None) -> bool:
        """Whether a request for `host` (the header, with or without a port) is for this server."""
        name = _name_of(host)
        if name is None:
            return False
        if "*" in self.hosts or name in self.hosts or name in self.own_names:
            return True
        # An address cannot be rebound to another; from outside a server that listens here only is not reached by one.
        return not self.is_local and _is_address(name)

    def may_call(self, headers: Headers, scheme: str) -> bool:
        """Whether the site that has made a browser send this request may have its answer."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None:
            return "*" in self.origins or origin.lower() in self.origins or self._is_own(origin, headers, scheme)
        if site in (None, "none", "same-origin"):
            return True
        # A link from elsewhere may open the page; a frame is the policy's business. No script sees what comes of it.
        return headers.get("sec-fetch-mode") == "navigate"

    def is_other(self, headers: Headers, scheme: str) -> bool:
        """Whether the request is one of another site's."""
        origin = headers.get("origin")
        return origin is not None and not self._is_own(origin, headers, scheme)

    def _is_own(self, origin: str, headers: Headers, scheme: str) -> bool:
        parts = urlsplit(origin.lower())
        if not parts.netloc:
            return False  # "null": a sandboxed frame, a file
        asked = {headers.get("host", "").lower()}
        # Behind a proxy that ends TLS the host may come with or without the port that its scheme implies.
        asked |= {f"{host}:{port}" for host in tuple(asked) if ":" not in host for port in (80, 443)}
        return (
            parts.netloc in asked and parts.scheme in ("http", "https") and not (scheme == "https" and parts.scheme == "http")
        )

    def frame_ancestors(self) -> str:
        """Who may show the page in a frame."""
        return " ".join(["'self'", *(SPACES_FRAMES if self.is_on_spaces else ()), *sorted(self.origins - {"*"})])


class SitesMiddleware:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, sites: Sites) -> None:
        self._app, self._sites = app, sites
        policy = {**POLICY, "frame-ancestors": sites.frame_ancestors()}
        if sites.is_on_spaces:  # Gradio's page asks the hub how the Space is
            policy["connect-src"] += f" {SPACES_FRAMES[0]}"
        self._policy = "; ".join(f"{name} {value}" for name, value in policy.items())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme = headers.get("x-forwarded-proto", scope.get("scheme", "http")).split(",")[0].strip()
        refusal = self._refusal(scope["path"], headers, scheme)
        other = headers.get("origin") if refusal is None and self._sites.is_other(headers, scheme) else None

        async def marking_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._mark(MutableHeaders(scope=message), scheme, other)
            await send(message)

        if refusal is not None:
            await refusal_at(scope["path"], 403, refusal)(scope, receive, marking_send)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204, headers=_preflight(headers))(scope, receive, marking_send)
            return
        await self._app(scope, receive, marking_send)

    def _refusal(self, path: str, headers: Headers, scheme: str) -> str | None:
        if not self._sites.answers_to(headers.get("host")) and path not in ANY_HOST_PATHS:
            return "this server does not answer under that name; its operator can allow it with --allowed_hosts"
        if any(mark in path for mark in OTHER_SERVERS):
            return "this server fetches nothing from others and sends nobody to them"
        if not self._sites.may_call(headers, scheme):
            return "another site may not call this server; its operator can allow it with --allowed_origins"
        return None

    def _mark(self, headers: MutableHeaders, scheme: str, other: str | None) -> None:
        if other is not None:  # one that the operator allows
            headers["Access-Control-Allow-Origin"] = other
            headers["Access-Control-Allow-Credentials"] = "true"
        headers.add_vary_header("Origin")
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "same-origin"
        headers["Content-Security-Policy"] = self._policy
        cookies = headers.getlist("set-cookie")
        if cookies:
            del headers["set-cookie"]
            for cookie in cookies:
                headers.append("set-cookie", self._kept(cookie, scheme))

    def _kept(self, cookie: str, scheme: str) -> str:
        """A cookie that stays with this site, and with TLS where there is any. In a Space's frame it has to be sent from
        within another site's page, which browsers allow to secure cookies only."""
        parts = [part.strip() for part in cookie.split(";")]
        parts = [part for part in parts if part.lower() != "secure" and not part.lower().startswith("samesite=")]
        if scheme == "https":
            parts.append("Secure")
        parts.append("SameSite=None" if self._sites.is_on_spaces and scheme == "https" else "SameSite=Lax")
        return "; ".join(parts)


def _preflight(headers: Headers) -> dict[str, str]:
    """What a browser may send after having asked."""
    asked = headers.get("access-control-request-headers")
    allowed = {"Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE", "Access-Control-Max-Age": "600"}
    return allowed | ({"Access-Control-Allow-Headers": asked} if asked else {})


def _name_of(host: str | None) -> str | None:
    """The name or address in a Host header, in lower case, without port and brackets; None for what is neither."""
    if not host or any(ch in host for ch in "@/\\ \t"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "").rstrip(".") or None if parts.port is None or parts.port >= 0 else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _checked_host(host: str) -> str:
    name = host.strip().lower()
    if name != "*" and _name_of(name) != name:
        raise RequestError(f"allowed_hosts={host!r} is not a host's name; give names without scheme and port", "allowed_hosts")
    return name


def _checked_origin(origin: str) -> str:
    text = origin.strip().lower().rstrip("/")
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query):
        raise RequestError(
            f"allowed_origins={origin!r} is not an origin; give scheme, name and port, such as https://example.org",
            "allowed_origins",
        )
    return text
