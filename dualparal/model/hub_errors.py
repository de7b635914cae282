"""Why the hub could not be asked, as one sentence with the way out, for whatever huggingface_hub and what is below it raise.

Kinds of errors are told by their names: the HTTP library below huggingface_hub has changed twice. Needs no network, never tells
the token.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from dualparal.errors import CheckpointError, DualParalError, PresetError

AGAIN = "run again to go on"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: Exception, repo_id: str, revision: str | None) -> DualParalError:
    """`error`, raised while `repo_id` was asked for, as ours: `PresetError` for what cannot be a hub id, else
    `CheckpointError`."""
    chain = list(_chain(error))
    kinds = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if "HFValidationError" in kinds:
        return PresetError(f"'{repo_id}' is neither a folder nor a hub id: {_first_line(error)}")
    sentence = (
        _of_this_host(chain, repo_id)
        or _of_the_hub(chain, kinds, repo_id, revision)
        or _of_the_way(chain, kinds, repo_id)
        or f"{repo_id} could not be downloaded: {type(error).__name__}: {_first_line(error)}; {AGAIN}"
    )
    return CheckpointError(sentence)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_this_host(chain: list[BaseException], repo_id: str) -> str | None:
    """The disk, and the token as it stands in the environment."""
    from huggingface_hub import constants

    where = constants.HF_HUB_CACHE
    for link in chain:
        number = link.errno if isinstance(link, OSError) else None
        if number in FULL or "No space left" in str(link):
            return f"{repo_id} could not be downloaded: no space left in {where}; free some or set HF_HOME, {AGAIN}"
        if number in FORBIDDEN:
            return f"{repo_id} could not be downloaded: {where} cannot be written; make it writable or set HF_HOME"
    return None


def _of_the_hub(chain: list[BaseException], kinds: set[str], repo_id: str, revision: str | None) -> str | None:
    """What the hub answered."""
    answers: list[Any] = [answer for link in chain if (answer := getattr(link, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    if "GatedRepoError" in kinds:
        return f"{repo_id} asks for consent: accept its terms on the hub and set HF_TOKEN"
    if status == 401 and "Authorization" in answers[0].request.headers:
        return f"{repo_id} could not be had: the hub refused the token (401); correct HF_TOKEN or run hf auth login"
    if status == 403:
        return (
            f"{repo_id} could not be had: the hub forbids it (403); accept its terms there or give HF_TOKEN the right to read"
        )
    if "RepositoryNotFoundError" in kinds or status == 401:
        return f"there is no model {repo_id} on the hub (or it is private: set HF_TOKEN)"
    if "RevisionNotFoundError" in kinds:
        return f"{repo_id} has no revision {revision}; correct the preset's revision"
    if "RemoteEntryNotFoundError" in kinds:
        return f"{repo_id} lacks a file: {_first_line(chain[0])}"
    if status is not None and (status == 429 or status >= 500):
        wait_s = str(answers[0].headers.get("Retry-After", ""))
        pause = f"{wait_s} s" if wait_s.isdigit() else "some minutes"
        return f"{repo_id} could not be downloaded: the hub is busy or being mended ({status}); wait {pause}, then {AGAIN}"
    if status is not None and status >= 400:
        return f"{repo_id} could not be downloaded: the hub answered {status}; {AGAIN}"
    return None


def _of_the_way(chain: list[BaseException], kinds: set[str], repo_id: str) -> str | None:
    """What is between this host and the hub."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    root = chain[-1]
    if "OfflineModeIsEnabled" in kinds:
        return f"{repo_id} is not whole on this host and HF_HUB_OFFLINE is set; unset it to download"
    if not _is_sendable_token():
        return f"{repo_id} could not be asked for: HF_TOKEN holds characters that no token has; copy it again"
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        return f"{repo_id} could not be asked for: HF_ENDPOINT={endpoint} is no address; write https://HOST"
    if kinds & {"JSONDecodeError", "FileMetadataError"} or isinstance(root, json.JSONDecodeError):
        return (
            f"{repo_id} could not be downloaded: what answers at {endpoint} is not the hub, perhaps a network's login page; "
            "log in there or correct HF_ENDPOINT"
        )
    if "ProxyError" in kinds or "proxy" in str(root).lower():
        return f"{repo_id} could not be downloaded: the proxy failed ({_first_line(root)}); correct or unset HTTPS_PROXY"
    if kinds & {"TransportError", "ConnectError", "TimeoutException", "ConnectionError", "gaierror"}:
        return (
            f"{repo_id} is not whole on this host and the hub cannot be reached at {endpoint} ({_first_line(root)}); check the "
            f"network, HF_HOME or HF_ENDPOINT, {AGAIN}"
        )
    if "LocalEntryNotFoundError" in kinds:
        return (
            f"{repo_id} is not whole on this host and the hub cannot be reached; check the network, HF_HOME or HF_HUB_OFFLINE"
        )
    return None


def _is_sendable_token() -> bool:
    """Whether the token, if there is one, can stand in a header."""
    from huggingface_hub import get_token

    try:
        token = get_token() or ""
    except (OSError, ValueError):  # a file of it that cannot be read
        return False
    return token.isascii() and token.isprintable() and " " not in token


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
