"""Reads back what an mp4 made here says about itself: the settings it was made with, and its frames.

Files come from strangers (people drop videos on the page), so no decoder is started: the few boxes needed are read here, with a
bound on everything. Follows ISO/IEC 14496-12 (boxes) and Apple's `ilst` layout for the comment. Only mp4 files with an index
(`moov`) are understood, which is all that this program writes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dualparal.errors import RequestError
from dualparal.paths import is_file, why_missing
from dualparal.request import GenerationRequest

MAX_INDEX_BYTES = 16 * 2**20  # a two-hour video of ours has an index of about 1 MB
MAX_SETTINGS_BYTES = 2**18
MAX_TOP_BOXES = 64
MAX_TIME_RUNS = 1000  # ours have one: all frames last equally long
WAY_OUT = "drop an mp4 that was made by this program"


def read_settings(path: str | Path) -> GenerationRequest:
    """The request an mp4 was made with. Raises `RequestError` for anything that is not a video made here."""
    text = describe(path)["settings"]
    if text is None:
        raise RequestError(f"{_name(path)} holds no settings; {WAY_OUT}")
    return GenerationRequest.from_json(text)


def describe(path: str | Path) -> dict[str, Any]:
    """num_frames, fps, width, height, duration (seconds) and settings (the stored text, or None) of an mp4.

    Raises `RequestError` when the file is not an mp4 with one video track.
    """
    if not is_file(path):  # a pipe or a device would be read for ever
        raise RequestError(f"{_name(path)} is not a file{why_missing(path)}; {WAY_OUT}")
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return _describe_index(_index(file))
    except OSError as error:
        raise RequestError(f"{_name(path)} cannot be read: {error.strerror}; {WAY_OUT}") from None
    except (_NotOurs, struct.error, ValueError, IndexError, ZeroDivisionError) as error:
        why = str(error) if isinstance(error, _NotOurs) else "its index is damaged"
        raise RequestError(f"{_name(path)} is not a video made here: {why}; {WAY_OUT}") from None


def format_info(path: str | Path) -> str:
    """What `python -m dualparal info` prints: size, length, then each stored setting on a line."""
    found = describe(path)
    lines = [
        f"{found['width']} x {found['height']}, {found['num_frames']} frames at {found['fps']:g} fps, {found['duration']:.2f} s"
    ]
    read_settings(path)  # or say why not
    settings = json.loads(found["settings"])
    return "\n".join(lines + [f"{name}: {value}" for name, value in settings.items()])


def ffmetadata(settings: str) -> str:
    """An ffmetadata file that stores `settings` as the comment. Raises ValueError for text that could not be read back."""
    if len(settings.encode()) > MAX_SETTINGS_BYTES or "\0" in settings:
        raise ValueError(f"settings must be at most {MAX_SETTINGS_BYTES} bytes of text without NUL")
    special = {ord(ch): "\\" + ch for ch in "=;#\\\r\n"}
    return f";FFMETADATA1\ncomment={settings.translate(special)}"  # a line end after a backslash would count as escaped


class _NotOurs(Exception):
    """Why a file cannot have been written by this program."""


def _name(path: str | Path) -> str:
    name = ascii(Path(path).name)
    return name if len(name) <= 80 else name[:77] + "..."


def _index(file: BinaryIO) -> bytes:
    """The `moov` box's content. Boxes are skipped by seeking, so a huge file costs nothing."""
    file.seek(0, 2)
    end = file.tell()
    if not end:
        raise _NotOurs("it is empty")
    position = 0
    for number in range(MAX_TOP_BOXES):
        file.seek(position)
        size, kind, header = _box_header(file.read(16))
        if number == 0 and kind != b"ftyp":
            break
        size = size or end - position
        if size < header or position + size > end:
            raise _NotOurs("it is cut off")
        if kind == b"moov":
            if size > MAX_INDEX_BYTES:
                raise _NotOurs(f"its index of {size} bytes is larger than {MAX_INDEX_BYTES}")
            file.seek(position + header)
            return file.read(size - header)
        position += size
        if position >= end:
            raise _NotOurs("it has no index")
    raise _NotOurs("it is not an mp4")


def _box_header(head: bytes) -> tuple[int, bytes, int]:
    """Size of a box, its four letters, and the length of its header."""
    if len(head) < 8:
        raise _NotOurs("it is cut off")
    size, kind = struct.unpack_from(">I4s", head)
    if size == 1:
        return struct.unpack_from(">Q", head, 8)[0], kind, 16
    return size, kind, 8


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes lying in `data`, one after another."""
    while len(data) >= 8:
        size, kind, header = _box_header(bytes(data[:16]))
        size = size or len(data)
        if size < header or size > len(data):
            raise _NotOurs("its index is damaged")
        yield kind, data[header:size]
        data = data[size:]


def _find(data: memoryview, *kinds: bytes) -> memoryview | None:
    """The first box reached by following `kinds` inwards."""
    for wanted in kinds:
        inner = next((content for kind, content in _boxes(data) if kind == wanted), None)
        if inner is None:
            return None
        # A `meta` box starts with a version, unlike other boxes that hold boxes.
        data = inner[4:] if wanted == b"meta" else inner
    return data


def _need(data: memoryview, *kinds: bytes) -> memoryview:
    found = _find(data, *kinds)
    if found is None:
        raise _NotOurs("it has no video track")
    return found


def _describe_index(moov: bytes) -> dict[str, Any]:
    index = memoryview(moov)
    track = _need(index, b"trak")
    media = _need(track, b"mdia")
    if bytes(_need(media, b"hdlr")[8:12]) != b"vide":
        raise _NotOurs("its first track is not a video")
    times = _need(media, b"minf", b"stbl", b"stts")
    (num_entries,) = struct.unpack_from(">I", times, 4)
    if num_entries > MAX_TIME_RUNS:
        raise _NotOurs("its frames are not evenly spaced")
    runs = [struct.unpack_from(">II", times, 8 + 8 * entry) for entry in range(num_entries)]
    num_frames, ticks = sum(count for count, _ in runs), sum(count * delta for count, delta in runs)
    rate = _timescale(_need(media, b"mdhd"))
    width, height = struct.unpack_from(">II", bytes(_need(track, b"tkhd")[-8:]))  # 16.16 fixed point
    return {
        "num_frames": num_frames,
        "fps": num_frames * rate / ticks,
        "width": width >> 16,
        "height": height >> 16,
        "duration": ticks / rate,
        "settings": _comment(index),
    }


def _timescale(mdhd: memoryview) -> int:
    """Ticks per second of a track."""
    return int(struct.unpack_from(">I", mdhd, 20 if mdhd[0] == 1 else 12)[0])


def _comment(index: memoryview) -> str | None:
    data = _find(index, b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")
    if data is None:
        return None
    if len(data) - 8 > MAX_SETTINGS_BYTES:
        raise _NotOurs(f"its comment of {len(data)} bytes is longer than {MAX_SETTINGS_BYTES}")
    return bytes(data[8:]).decode("utf-8")  # after type and locale
