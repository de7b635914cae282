"""What a crash or a power cut may leave of files: nothing half-written, nothing renamed whose bytes were still on their way.

A rename alone survives a killed process; a machine that loses power may keep the new name and lose the bytes. Knows no job.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TS_PACKET_BYTES = 188
SEAL = "seal"
STEERED = "steered.json"  # within a job's folder: its request, once it was steered
START_IMAGE = "start.png"  # within a job's folder: the picture that its film begins with, in the film's size
START_CLIP = "start.mp4"  # within a job's folder: the end of a video file that it continues, in the film's size and rate
CLIP = "video "  # before the digest of it: what a job's settings say of that file
START_LATENTS = "start.safetensors"  # within a job's folder: the end of the film that it continues
BEFORE = "before.mp4"  # within a job's folder: that film, where the two are joined
END_LATENTS = "end/latents.safetensors"  # within a job's folder: the end of its own film, for one that continues it
STATE_FOLDER = "state"  # within a job's folder: what resume needs


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


def private(path: str, flags: int) -> int:
    """An `opener` of files that only this user may read, whatever the umask. Raises OSError."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


@contextlib.contextmanager
def written_atomically(path: Path, *, is_durable: bool = True, is_shared: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed when the block ends well and removed when it does not: `path` is
    there whole, or as it was before. With `is_durable` that holds for a power cut too; `is_shared`: several programs may write
    the same file at once. Raises OSError."""
    own = f".{secrets.token_hex(4)}" if is_shared else ""
    partial = path.with_name(f".{path.name}{own}.part")
    try:
        yield partial
        (replace_durably if is_durable else os.replace)(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str, before_naming: Callable[[Path], None] = lambda partial: None) -> None:
    """Write `text` as `written_atomically` does. `before_naming` is given the written file before it has its name. Raises
    OSError."""
    with written_atomically(path) as partial:
        with open(partial, "w", encoding="utf-8", opener=private) as opened:
            opened.write(text)
        before_naming(partial)


def remove_partials(
    folder: Path, pattern: str = ".*.part", *, is_ours: Callable[[str], bool] = bool, min_age_s: float = 0.0
) -> None:
    """Remove what writers that were killed left half-written: files like `pattern` whose name `is_ours` and that are older than
    `min_age_s`. One that cannot be removed stays."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if is_ours(path.name) and path.stat().st_mtime <= time.time() - min_age_s:
                path.unlink(missing_ok=True)


def is_file(path: Path) -> bool:
    """Whether there is a file; not where the disk does not say."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_whole_segment(path: Path, checksum: str = "") -> bool:
    """Whether an MPEG-TS file is there and ends with a packet (an empty or torn one is what a power cut leaves), and holds the
    bytes of `checksum`, where there is one."""
    try:
        size = path.stat().st_size
        return size > 0 and size % TS_PACKET_BYTES == 0 and (not checksum or checksum_of(path.read_bytes()) == checksum)
    except OSError:
        return False


def checksum_of(data: bytes) -> str:
    """What tells these bytes from any others that a disk might give back."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """`record`, a JSON object, with a checksum over the rest of it."""
    return {**record, SEAL: _seal_of(record)}


def unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `sealed`; what never was, as older versions wrote it, is given back as it is. Raises ValueError when the
    checksum does not fit."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    if SEAL in record and record[SEAL] != _seal_of(rest):
        raise ValueError("it is damaged: its checksum does not fit")
    return rest


def write_record(path: Path, record: dict[str, Any], before_naming: Callable[[Path], None] = lambda partial: None) -> None:
    """Write a JSON object as `write_atomically` does, sealed. A path that is not UTF-8 is told by escapes, which JSON reads
    back as they were. Raises OSError."""
    text = json.dumps(sealed(record), ensure_ascii=False, indent=1).encode(errors="backslashreplace").decode()
    write_atomically(path, text, before_naming)


def read_record(path: Path) -> dict[str, Any]:
    """The inverse of `write_record`. Raises OSError, and ValueError or RecursionError for what is damaged."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it does not hold an object")
    return unsealed(found)


def _seal_of(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=8).hexdigest()
