"""What Gradio takes from the machine around it, and what of that would stop a server: proxies between it and itself, a
temporary folder that is another user's, a variable that makes it wait where no signal is heard.

Nothing here is fetched through a proxy: the page comes from this server alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "dualparal-page-"
WAITS = "GRADIO_DEBUG"
PORT = "GRADIO_SERVER_PORT"


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Without variables for proxies (Gradio asks itself whether it is there; some that curl understands cannot even be read by
    its client), without `GRADIO_DEBUG`, and without a `GRADIO_SERVER_PORT` that is no port."""
    before = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") or name == WAITS}
    if PORT in os.environ and not is_port(os.environ[PORT]):
        before[PORT] = os.environ[PORT]
    for name in before:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def private_folder() -> Iterator[None]:
    """For what visitors upload and Gradio writes: a folder of this server's own, which nobody else may enter and which goes
    with it, unless `GRADIO_TEMP_DIR` names one. What killed servers of this user have left goes first. Raises OSError."""
    if os.environ.get("GRADIO_TEMP_DIR"):
        yield
        return
    from gradio import routes  # which has read the variable by now

    remove_leftovers(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before, routes.DEFAULT_TEMP_DIR = routes.DEFAULT_TEMP_DIR, str(folder)
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield
        finally:
            routes.DEFAULT_TEMP_DIR = before
    finally:
        os.environ.pop("GRADIO_TEMP_DIR", None)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def remove_leftovers(parent: Path) -> None:
    """Remove folders of servers of this user that are no more: nobody holds their lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(held)


def is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < int(text[:9]) < 65536


def host_of(given: str | None) -> str | None:
    """An address to listen on as Gradio wants it: IPv6 in brackets."""
    return f"[{given}]" if given and ":" in given and not given.startswith("[") else given


def root_of(given: str) -> str:
    """A path behind a proxy as Gradio wants it, with a slash before it and none after; "" for the site's own root."""
    return given.rstrip("/") if "://" in given else "/".join(["", *filter(None, given.strip().split("/"))])
