"""Pictures from strangers: kind and size are read from the first bytes here, in plain Python; decoding, turning and cropping is
done by `picture_process`, which has little memory and little time.

What comes back is a PNG of the size asked for. Follows the PNG, JPEG (ITU-T T.81) and WebP (RFC 9649) headers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dualparal.errors import RequestError
from dualparal.paths import is_file, why_missing

FIELD = "start_image"
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
MIN_SIDE_PX = 16
TIMEOUT_S = 60.0
PROCESS = Path(__file__).with_name("picture_process.py")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NO_SIZE_IN = {0xC4, 0xC8, 0xCC}  # of JPEG's SOF markers C0 ... CF those that are something else
WAY_OUT = "give a PNG, JPEG or WebP"


def read_picture(path: Path, *, width: int, height: int) -> bytes:
    """The picture in the file at `path`, upright, opaque (on white), scaled and cropped to `width` x `height`: the bytes of a
    PNG. Raises `RequestError`."""
    if not is_file(path):
        raise _refused(f"there is no such file{why_missing(path)}")
    try:
        with open(path, "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refused(f"it cannot be read ({error.strerror})") from None
    return cropped(data, width=width, height=height)


def cropped(data: bytes, *, width: int, height: int) -> bytes:
    """`read_picture` for a file's bytes."""
    kind, own_width, own_height = kind_and_size(data)
    if min(own_width, own_height) < MIN_SIDE_PX:
        raise _refused(f"it has {own_width} x {own_height} pixels; give one of at least {MIN_SIDE_PX} x {MIN_SIDE_PX}")
    if own_width * own_height > MAX_PIXELS:
        raise _refused(
            f"it has {own_width} x {own_height} pixels, which are more than {MAX_PIXELS // 10**6} million; give a smaller one"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROCESS), kind, str(width), str(height)],
            input=data, capture_output=True, timeout=TIMEOUT_S, start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _refused(f"opening it took longer than {TIMEOUT_S:.0f} s; give a simpler one") from None
    except OSError as error:
        raise _refused(f"nothing can be started to open it ({error.strerror}); free memory") from None
    found = done.stdout
    if done.returncode or not found.startswith(PNG_SIGNATURE) or kind_and_size(found) != ("PNG", width, height):
        raise _refused(f"it is damaged, or no {kind} after all; {WAY_OUT} that other programs can open")
    return found


def kind_and_size(data: bytes) -> tuple[str, int, int]:
    """("PNG", "JPEG" or "WEBP", width, height) by the header. Raises `RequestError`."""
    if len(data) > MAX_BYTES:
        raise _refused(f"the file has more than {MAX_BYTES // 2**20} MiB; give a smaller one")
    found = None
    if data.startswith(PNG_SIGNATURE):
        found = _of_png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        found = _of_jpeg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = _of_webp(data)
    else:
        raise _refused(f"the file is neither PNG, JPEG nor WebP; {WAY_OUT}")
    if found is None:
        raise _refused(f"the file's beginning is damaged; {WAY_OUT} that other programs can open")
    return found


def _of_png(data: bytes) -> tuple[str, int, int] | None:
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return "PNG", int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def _of_jpeg(data: bytes) -> tuple[str, int, int] | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # a filling byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in NO_SIZE_IN:
            return "JPEG", int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        elif marker == 0xDA or length < 2:
            return None
        else:
            at += 2 + length
    return None


def _of_webp(data: bytes) -> tuple[str, int, int] | None:
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return "WEBP", 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return "WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return "WEBP", width, height
    return None


def _refused(why: str) -> RequestError:
    return RequestError(f"{FIELD}: {why}", FIELD)
