"""Whose job is whose, without accounts: an unguessable token kept in the browser, or the name somebody logged in with.

Only a digest of the token reaches the disk, so that reading a job's files does not let anyone act as its owner. A job made
without a token (command line, Python, an API call that gave none) belongs to whoever knows its id.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

MAX_TOKEN_CHARS = 200
OPERATOR = "operator:"  # no token's digest and no login's name


def new_token() -> str:
    """A fresh secret for one browser."""
    return secrets.token_urlsafe(24)


def owner_of(token: object, username: str | None = None) -> str:
    """The owner name that goes into a job: the login if there is one, else a digest of `token`, else ''."""
    if username:
        return f"user:{username}"
    if not isinstance(token, str) or not token:
        return ""
    return hashlib.sha256(token[:MAX_TOKEN_CHARS].encode("utf-8", "replace")).hexdigest()[:32]


def address_of(http: Any) -> str:
    """The address that a `gr.Request` comes from, '' when it is not known."""
    return str(getattr(getattr(http, "client", None), "host", "") or "")


def may_touch(owner: str, job_owner: str) -> bool:
    """True if `owner` may see, stop and delete a job of `job_owner`."""
    return not job_owner or is_same(owner, job_owner)


def is_same(given: str, known: str) -> bool:
    """Whether two secrets are the same, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), known.encode("utf-8", "replace"))
