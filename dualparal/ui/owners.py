"""Whose job is whose, without accounts: an unguessable token kept in the browser, or the name somebody logged in with.

Only a digest of the token reaches the disk, so that reading a job's files does not let anyone act as its owner. A job made
without a token (command line, Python, an API call that gave none) belongs to whoever knows its id.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

MAX_TOKEN_CHARS = 200


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


def may_touch(owner: str, job_owner: str) -> bool:
    """True if `owner` may see, stop and delete a job of `job_owner`."""
    return not job_owner or hmac.compare_digest(owner.encode(), job_owner.encode())
