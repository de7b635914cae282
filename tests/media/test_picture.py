"""Pictures from strangers: what is opened, how it is turned and cropped, and what is refused before anything opens it."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualparal.errors import RequestError
from dualparal.media import picture
from dualparal.media.picture import cropped, kind_and_size, read_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def as_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image).astype(int)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above blue, 40 wide and 60 high."""
    image = Image.new("RGB", (40, 60), RED)
    image.paste(BLUE, (0, 30, 40, 60))
    return image.convert(mode)


KINDS = {
    "png": ("RGB", "PNG", {}),
    "png of a palette": ("P", "PNG", {}),
    "jpeg": ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
    "progressive jpeg": ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    "jpeg with a comment": ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "comment": b"x" * 60_000}),
    "webp": ("RGB", "WEBP", {"quality": 95}),
    "webp without loss": ("RGB", "WEBP", {"lossless": True}),
    "webp with a ground": ("RGBA", "WEBP", {"lossless": True, "exif": Image.Exif()}),
}


@pytest.mark.parametrize(("mode", "kind", "options"), KINDS.values(), ids=KINDS)
def test_kinds(mode: str, kind: str, options: dict[str, Any]) -> None:
    data = as_bytes(halves(mode), kind, **options)
    assert kind_and_size(data) == (kind, 40, 60)
    found = opened(cropped(data, width=48, height=32))
    assert found.shape == (32, 48, 3)
    assert np.abs(found[4] - RED).max() < 40 and np.abs(found[-4] - BLUE).max() < 40


def test_grey_of_sixteen_bits() -> None:
    found = opened(cropped(as_bytes(Image.fromarray(np.full((40, 40), 0x8000, np.uint16)), "PNG"), width=32, height=32))
    assert np.abs(found - 128).max() <= 1


def test_cropped_in_the_middle() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(BLUE, (100, 0, 200, 100))
    found = opened(cropped(as_bytes(image, "PNG"), width=32, height=32))
    assert np.abs(found[:, 2:-2] - BLUE).max() < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_as_the_camera_was_held(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = opened(cropped(as_bytes(halves(), kind, exif=exif), width=48, height=32))
    assert np.abs(found[16, 4] - BLUE).max() < 60 and np.abs(found[16, -4] - RED).max() < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_transparent_ground_is_white(mode: str) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    options = {"transparency": 0} if mode == "P" else {}
    data = as_bytes(Image.new("P", (40, 40)) if mode == "P" else image.convert(mode), "PNG", **options)
    assert (opened(cropped(data, width=16, height=16)) == WHITE).all()


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return picture.PNG_SIGNATURE + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


REFUSED = {
    "one pixel": (as_bytes(Image.new("RGB", (1, 1)), "PNG"), "it has 1 x 1 pixels; give one of at least 16 x 16"),
    "100 megapixels": (huge_png(10_000, 10_000), "it has 10000 x 10000 pixels, which are more than 64 million"),
    "gif": (as_bytes(Image.new("RGB", (40, 40)), "GIF"), "neither PNG, JPEG nor WebP"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither PNG, JPEG nor WebP"),
    "nothing": (b"", "neither PNG, JPEG nor WebP"),
    "only a header": (huge_png(64, 64), "it is damaged, or no PNG after all"),
    "a torn header": (picture.PNG_SIGNATURE + b"\0\0", "the file's beginning is damaged"),
    "a torn jpeg": (as_bytes(halves(), "JPEG")[:100], "the file's beginning is damaged"),
    "a torn webp": (as_bytes(halves(), "WEBP")[:22], "the file's beginning is damaged"),
    "half a jpeg": (as_bytes(Image.effect_noise((200, 200), 90), "JPEG")[:3000], "it is damaged, or no JPEG after all"),
}


@pytest.mark.parametrize(("data", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        cropped(data, width=32, height=32)
    assert said in str(caught.value) and str(caught.value).startswith("start_image: ") and "\n" not in str(caught.value)
    assert caught.value.field == "start_image"


def test_nothing_is_started_for_what_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", start)
    for name in ("one pixel", "100 megapixels", "gif", "nothing", "a torn header"):
        with pytest.raises(RequestError):
            cropped(REFUSED[name][0], width=32, height=32)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.png").write_bytes(as_bytes(halves(), "PNG"))
    assert opened(read_picture(path, width=32, height=16)).shape == (16, 32, 3)
    for wrong in (tmp_path, tmp_path / "b.png"):
        with pytest.raises(RequestError, match="start_image: there is no such file"):
            read_picture(wrong, width=32, height=16)
    monkeypatch.setattr(picture, "MAX_BYTES", 100)
    with pytest.raises(RequestError, match="the file has more than"):
        read_picture(path, width=32, height=16)


def test_a_picture_that_takes_too_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    greedy = tmp_path / "greedy.py"
    source = picture.PROCESS.read_text().replace("2 * 2**30", "2**28")
    greedy.write_text(source.replace("    upright =", "    bytearray(2**30)\n    upright ="))
    monkeypatch.setattr(picture, "PROCESS", greedy)
    with pytest.raises(RequestError, match="it is damaged, or no PNG after all"):
        cropped(as_bytes(halves(), "PNG"), width=32, height=32)
    greedy.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(picture, "TIMEOUT_S", 0.5)
    with pytest.raises(RequestError, match="opening it took longer than"):
        cropped(as_bytes(halves(), "PNG"), width=32, height=32)
