"""Runs the ffmpeg that imageio-ffmpeg brings, so that nothing has to be installed on the machine.

Never through a shell; bytes go in and out through pipes that cannot deadlock; every run has a deadline. Nothing here knows
what a video is for.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg

from dualparal.errors import OutputError


def ffmpeg_path() -> str:
    """The ffmpeg binary (IMAGEIO_FFMPEG_EXE names another one). Raises `OutputError` when there is none."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OutputError(
            "no ffmpeg was found to write videos with; reinstall imageio-ffmpeg or name a binary in IMAGEIO_FFMPEG_EXE"
        ) from None


def check_ffmpeg() -> None:
    """Raise `OutputError` unless there is an ffmpeg that can be started and encodes H.264."""
    _check(ffmpeg_path())


@functools.cache
def _check(path: str) -> None:
    way_out = "reinstall imageio-ffmpeg or name another binary in IMAGEIO_FFMPEG_EXE"
    try:
        command = [path, "-hide_banner", "-nostdin", "-encoders"]
        done = subprocess.run(command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise OutputError(f"ffmpeg at {path} cannot be started ({why}); {way_out}") from None
    if done.returncode != 0:
        raise OutputError(f"ffmpeg at {path} ended with {done.returncode} when asked for its encoders; {way_out}")
    if b" libx264 " not in done.stdout:
        raise OutputError(f"ffmpeg at {path} was built without libx264, which writes the videos; {way_out}")


def run_ffmpeg(
    arguments: Sequence[str], *, what: str, data: memoryview | bytes = b"", folder: Path | None = None, timeout_s: float = 120.0
) -> bytes:
    """Run ffmpeg in `folder` with `data` on its standard input; returns what it wrote to its standard output.

    `what` says what is being done, for the message ("encoding block_0003.ts"). Raises `OutputError` with ffmpeg's own last
    words when it fails, or when it takes longer than `timeout_s`.
    """
    command = [ffmpeg_path(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", *arguments]
    try:
        # A session of its own: Ctrl-C in a terminal must reach us, not cut off the file ffmpeg is just writing.
        done = subprocess.run(
            command, input=data, capture_output=True, cwd=folder, timeout=timeout_s, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise OutputError(
            f"{what} took longer than {timeout_s:.0f} s and was given up; the disk or the machine is stuck"
        ) from None
    except OSError as error:
        raise OutputError(f"{what} failed: ffmpeg cannot be started: {error.strerror}") from None
    if done.returncode != 0:
        raise OutputError(f"{what} failed: {_last_words(done.stderr) or f'ffmpeg ended with {done.returncode}'}")
    return done.stdout


def _last_words(stderr: bytes) -> str:
    """The line of ffmpeg's complaint that names the cause: a full disk before all else, then the last line."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    full = [line for line in lines if "No space left" in line]
    return "no space left on the disk; free some and resume" if full else (lines[-1][:300] if lines else "")
