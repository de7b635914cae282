"""Bearer tokens of `/v1`: which ones are known, and whose videos a caller may touch.

With keys each of them is an owner of its own, and nobody without one is let in but who has logged in on the page; a key that is
sent counts before a login's cookie, which a browser sends by itself. Without keys and without logins any token is an owner's
secret, as `owner` is in the page's own API. A link that is handed out with a video reads that video and no other.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from dualparal.errors import RequestError
from dualparal.paths import expand
from dualparal.ui import owners
from dualparal.ui.http.logins import asks_for_login, logged_in
from dualparal.ui.http.refusals import Refusal

if TYPE_CHECKING:
    from dualparal.ui.studio import Studio

VARIABLE = "DUALPARAL_API_KEYS"
KEY = re.compile(r"[\x21-\x7e]{16,200}")
LINK = "link"  # the parameter that carries one
CHALLENGE = {"WWW-Authenticate": "Bearer"}


def read_keys(given: Iterable[str], variable: str | None = None) -> tuple[str, ...]:
    """The keys that `--api_key` gives (a key, or `@FILE` with one a line) and that stand in `variable`, separated by blanks or
    commas. Raises `RequestError`, which shows none of them."""
    found: list[str] = []
    for one in given:
        if not one.startswith("@"):
            found.append(one)
            continue
        try:
            text = expand(one[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise RequestError(f"api_key: {one[1:]} cannot be read: {why}", "api_key") from None
        lines = [line.strip() for line in text.splitlines()]
        found += [line for line in lines if line and not line.startswith("#")]
    found += (variable or "").replace(",", " ").split()
    for number, key in enumerate(found, 1):
        if not KEY.fullmatch(key):
            raise RequestError(
                f"api_key: number {number} is not usable; a key has 16 to 200 letters, digits and signs without blanks, as "
                "`openssl rand -hex 24` prints one",
                "api_key",
            )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Access:
    """Who may do what."""

    studio: Studio
    keys: tuple[str, ...] = field(default=(), repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)  # of links

    def owner(self, request: Request) -> str:
        """Whose jobs the caller may touch. Raises `Refusal` (401)."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if kind.lower() == "bearer" else ""
        if self.studio.owner_of(token) == owners.OPERATOR:
            return owners.OPERATOR
        if token and self._is_known(token):
            return owners.owner_of(token)
        if not (token and self.keys) and (user := logged_in(request.scope)) is not None:
            return owners.owner_of("", user)
        if not self.keys and not asks_for_login(request.scope):
            return owners.owner_of(token)
        sentence = "this key is not known here" if token else "a key is missing: send the header Authorization: Bearer KEY"
        raise Refusal(
            401, f"{sentence}; the server's operator gives keys out (--api_key)", "invalid_api_key", headers=CHALLENGE
        )

    def reader(self, request: Request, job_id: str) -> str:
        """Whose jobs the caller may read, among which is `job_id` if the address is a link to it. Raises `Refusal`."""
        link = request.query_params.get(LINK)
        if link is not None and owners.is_same(link, self.link(job_id)):
            return owners.OPERATOR
        return self.owner(request)

    def link(self, job_id: str) -> str:
        """What an address of this video's contents carries in place of a key; it holds until the server ends."""
        return hmac.new(self.secret, job_id.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]

    def _is_known(self, token: str) -> bool:
        """Looks at all keys, so that the time tells nothing."""
        given = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        same = [hmac.compare_digest(given, hashlib.sha256(key.encode()).digest()) for key in self.keys]
        return any(same)
