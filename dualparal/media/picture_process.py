"""A program of its own: a picture on its standard input, upright, opaque and cropped to a size, as PNG on its standard output.

    python picture_process.py PNG|JPEG|WEBP WIDTH HEIGHT

It opens no file and can neither grow nor run for long: what it reads comes from strangers. Imports nothing of this package.
"""

from __future__ import annotations

import io
import resource
import sys

from PIL import Image, ImageOps

MAX_MEMORY_BYTES = 2 * 2**30
MAX_CPU_S = 30
GROUND = (255, 255, 255, 255)


def main() -> None:
    """Exits with a traceback for what cannot be opened."""
    kind, width, height = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for what, most in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, MAX_CPU_S), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(what, (most, most))
    picture = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=[kind])
    upright = _upright(picture)
    fitted = ImageOps.fit(_opaque(upright), (width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    fitted.save(out, "PNG")
    sys.stdout.buffer.write(out.getvalue())


def _upright(picture: Image.Image) -> Image.Image:
    """As its EXIF says that the camera was held."""
    return ImageOps.exif_transpose(picture)


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # grey of 16 bits
        return picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L").convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, GROUND), clear).convert("RGB")


if __name__ == "__main__":
    main()
