"""Numbers as people read them, and text made safe for HTML."""

from __future__ import annotations

import html
import re
import time

PATH = re.compile(r"(?<![\w.:/~-])/(?!v1/)(?:[^\s/:;,'\"()]+/)+([^\s/:;,'\"()]*)")


_hidden: set[str] = set()


def safe(text: object) -> str:
    """`text` escaped for HTML content and attributes."""
    return html.escape(str(text), quote=True)


def hide(*folders: object) -> None:
    """Make `without_paths` know these folders of the server, whose names may hold blanks or anything else."""
    _hidden.update(name for folder in folders if (name := str(folder)).count("/") > 1)


def without_paths(sentence: object) -> str:
    """`sentence` with each absolute path cut to its last name: visitors need not know where things lie on the server."""
    text = str(sentence)
    for folder in sorted(_hidden, key=len, reverse=True):
        inside = rf"{re.escape(folder)}(/(?:[^\s/:;,'\"()]+/)*|(?![\w.-]))"
        text = re.sub(inside, lambda found: "" if found[1] else folder.rpartition("/")[2], text)  # noqa: B023 - asked at once
    return PATH.sub(lambda found: found[1], text)


def short(text: str, num_chars: int = 90) -> str:
    """The first `num_chars` characters on one line, with an ellipsis when cut."""
    line = " ".join(text.split())
    return line if len(line) <= num_chars else line[: num_chars - 1].rstrip() + "…"


def duration(seconds: float) -> str:
    """A span of time: '0.4 s', '12 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def length(num_frames: int, fps: int) -> str:
    """The length of a video: '65 frames · 4.1 s'."""
    return f"{num_frames} frame{'s' * (num_frames != 1)} · {num_frames / fps:.1f} s"


def size(num_bytes: float) -> str:
    """An amount of memory or disk: '83 kB', '512 MB', '20.4 GB'."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= 0.95 * unit:
            return f"{num_bytes / unit:.{0 if num_bytes >= 99 * unit else 1}f} {name}"
    return f"{max(1, num_bytes / 1e3):.0f} kB"


def ago(created_s: float) -> str:
    """How long ago a moment (seconds since the epoch) was, roughly."""
    past_s = max(0.0, time.time() - created_s)
    if past_s < 60:
        return "just now"
    for unit_s, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if past_s >= unit_s:
            count = int(past_s // unit_s)
            return f"{count} {name}{'s' * (count != 1)} ago"
    return "just now"
