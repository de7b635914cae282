"""A program of its own: becomes an ffmpeg that has little memory and little time, as what it reads comes from strangers.

    python film_process.py FFMPEG MAX_BYTES ARGUMENTS...

`MAX_BYTES` is the most that a file which it writes may grow to. Imports nothing of this package.
"""

from __future__ import annotations

import os
import resource
import sys

MAX_MEMORY_BYTES = 3 * 2**30
MAX_CPU_S = 240
MAX_OPEN_FILES = 32


def main() -> None:
    ffmpeg, most_bytes, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    limits = (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, MAX_CPU_S), (resource.RLIMIT_FSIZE, most_bytes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES), (resource.RLIMIT_CORE, 0),
    )  # fmt: skip
    for what, most in limits:
        resource.setrlimit(what, (most, most))
    os.execve(ffmpeg, [ffmpeg, *arguments], {})


if __name__ == "__main__":
    main()
