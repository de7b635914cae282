"""What a crash or a power cut may leave of files: nothing half-written, nothing renamed whose bytes were still on their way.

A rename alone survives a killed process; a machine that loses power may keep the new name and lose the bytes. Knows no job.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TS_PACKET_BYTES = 188


def replace_durably(partial: Path, path: Path) -> None:
    """Rename `partial` to `path` once its bytes are on the disk, and the name too. Raises OSError."""
    sync(partial)
    os.replace(partial, path)
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole_segment(path: Path) -> bool:
    """Whether an MPEG-TS file is there and ends with a packet: an empty or torn one is what a power cut leaves."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return size > 0 and size % TS_PACKET_BYTES == 0
