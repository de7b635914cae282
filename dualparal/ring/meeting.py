"""The folder where the ranks of one host meet: torch's file store in it, which no other user can open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.errors import WorkerFailed

if TYPE_CHECKING:
    import torch.distributed as dist


def enter(folder: str, ranks: int) -> dist.Store:
    """The store of these ranks. Raises WorkerFailed when the folder is gone, as it is when the front end has died.

    Making torch's store holds the GIL, and in a folder that is gone it waits there for 300 s: nothing in this process would
    notice meanwhile that its front end has died. So nobody removes the folder while somebody enters.
    """
    import torch.distributed as dist

    try:
        with _held(folder, fcntl.LOCK_SH):
            return dist.FileStore(str(Path(folder) / "store"), ranks)
    except FileNotFoundError:
        raise WorkerFailed(f"the folder where the ranks meet is gone: {folder}") from None


def remove(folder: str) -> None:
    """Remove the folder once nobody is entering. Whoever comes later finds it gone."""
    with contextlib.suppress(OSError), _held(folder, fcntl.LOCK_EX):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: str, how: int) -> Iterator[None]:
    """Raises FileNotFoundError when the folder is gone, also when it went while this waited for it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, how)
        if os.fstat(opened).st_nlink == 0:
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(opened)
