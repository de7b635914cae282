"""Standard streams that end no program: closed, full, read by nobody any more, or of an encoding that lacks a character.

What a program prints about its work must never decide whether the work is done. Only a program whose answer is what it
prints has failed when that is lost; who stops reading (`| head -1`) has had enough.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

PLAIN = {"…": "...", "·": "-", "–": "-", "—": "-", "×": "x", "₀": "0", "’": "'", "“": '"', "”": '"'}
ERRORS = "readable"  # a codec's error handler


class Lossy(io.RawIOBase):
    """Writes to a descriptor; what that does not take is lost, and `error` says why."""

    def __init__(self, descriptor: int, error: OSError | None = None) -> None:
        self._descriptor, self.error = descriptor, error

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # whoever shares the terminal has made it so
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = self.error or error
                return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def run_safely(main: Callable[[], int], *, is_answer: bool) -> int:
    """Run a program's `main` with safe standard streams; returns the exit code. With `is_answer` what it prints is what it is
    for: 1 where standard output did not take that, and what went wrong on standard error."""
    _fill_gaps()
    out = _replace("stdout", 1)
    _replace("stderr", 2)
    try:
        code = main()
    except SystemExit as end:  # argparse's
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    if out.error is None or out.error.errno == errno.EPIPE:
        return code
    sys.stderr.write(f"error: standard output cannot be written: {out.error.strerror}\n")
    return 1 if is_answer and code == 0 else code


def _fill_gaps() -> None:
    """No file of the program's own may get the number of a closed standard stream, to which others write."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(null, True)


def _replace(name: str, descriptor: int) -> Lossy:
    before = getattr(sys, name)  # None where it was closed
    is_gone = before is None and name == "stdout"
    raw = Lossy(descriptor, OSError(errno.EBADF, os.strerror(errno.EBADF)) if is_gone else None)
    encoding = "utf-8" if before is None else before.encoding
    # Whoever follows a server's log in a file sees each line when it is printed.
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, ERRORS, line_buffering=True))
    return raw


def readable(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks as plain ones that mean the same, or spelt out."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(ch) or ch.encode("unicode_escape").decode() for ch in lost), error.end


codecs.register_error(ERRORS, readable)
