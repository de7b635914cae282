"""Paths as people give them: `~` written out, and what can be no path of this machine told in a sentence.

`is_folder` and `is_file` never raise, unlike `Path`'s own (a name that is too long, a folder that is somebody else's).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from dualparal.errors import OutputError, RequestError


def not_empty(text: str) -> str:
    """The type of a flag for a name: an empty one (an unset variable of a script) would be taken for another."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name or leave the option out")
    return text


def expand(given: str | Path) -> Path:
    """`given` as an absolute path, `~` and `~name` written out. Raises `RequestError` where there is no such home folder."""
    text = os.fspath(given)
    if not text or "\0" in text:
        raise RequestError(f"{text!a} is not a path; give a file's or a folder's name")
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise RequestError(f"{text} begins with a home folder that nobody knows; write the path out")
    return Path(os.path.abspath(path))


def is_folder(given: str | Path) -> bool:
    return os.path.isdir(os.path.expanduser(given))


def is_file(given: str | Path) -> bool:
    return os.path.isfile(os.path.expanduser(given))


def why_missing(given: str | Path) -> str:
    """In brackets what keeps a path from being looked at; "" where it is there, or simply is not."""
    try:
        os.stat(os.path.expanduser(given))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or error})"
    return ""


def check_can_write(folder: Path, way_out: str) -> None:
    """Raise `OutputError` unless `folder` can be written to or made. Touches nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    why = why_missing(folder).strip(" ()")
    if not why and os.path.islink(there) and not os.path.exists(there):
        why = f"{there} is a link to nowhere"
    elif not why and not os.path.isdir(there):
        why = f"{there} is not a folder"
    elif not why and not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} is not writable"
    if why:
        raise OutputError(f"{folder} cannot be written: {why}; {way_out}")


def home_cache() -> Path:
    """The user's cache folder; a private temporary one where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(named) if os.path.isabs(named) else _own_temp_folder()


def _own_temp_folder() -> Path:
    """The same folder for all programs of this user, that nobody else can have put there or reach."""
    folder = Path(tempfile.gettempdir()) / f"dualparal-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = os.lstat(folder)
        if about.st_uid == os.getuid() and about.st_mode & 0o170077 == 0o040000:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dualparal-"))
