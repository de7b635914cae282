"""Early looks as bytes: the small pictures of one block in one JPEG, side by side, and the looks of a film as an animated WebP.

Knows no job; numpy and Pillow only.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from dualparal.request import TEMPORAL_FACTOR

COLUMNS = 8  # pictures in a row of the JPEG
QUALITY = 45
MAX_PICTURES = 2048  # of a block; more would be wider or higher than a JPEG can be
FINISHED_PX = 128  # longest side of a finished block's pictures


def pack(pictures: np.ndarray) -> bytes:
    """Pictures [F, h, w, 3] uint8 as one JPEG, `COLUMNS` in a row; of a very long block the first `MAX_PICTURES`."""
    pictures = pictures[:MAX_PICTURES]
    num, height, width, _ = pictures.shape
    columns = min(COLUMNS, num)
    rows = -(-num // columns)
    padded = np.concatenate([pictures, np.zeros((rows * columns - num, height, width, 3), np.uint8)])
    sheet = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "JPEG", quality=QUALITY, comment=str(num))
    return buffer.getvalue()


def unpack(data: bytes) -> np.ndarray:
    """The pictures of `pack`, [F, h, w, 3] uint8. Raises ValueError for what is none of its JPEGs."""
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        num, sheet = int(image.info.get("comment", b"0")), np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"not a look: {error}") from None
    if num < 1:
        raise ValueError("a look of no pictures")
    columns = min(COLUMNS, num)
    rows = -(-num // columns)
    if sheet.shape[0] % rows or sheet.shape[1] % columns:
        raise ValueError(f"{sheet.shape[1]} x {sheet.shape[0]} pixels do not hold {num} pictures")
    height, width = sheet.shape[0] // rows, sheet.shape[1] // columns
    cells = sheet.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return cells.reshape(rows * columns, height, width, 3)[:num]


def shrink(frames: np.ndarray) -> np.ndarray:
    """Of a finished block's frames [F, H, W, 3] one for each latent, with at most `FINISHED_PX` pixels on a side."""
    middle, num_alone = TEMPORAL_FACTOR // 2, len(frames) % TEMPORAL_FACTOR  # a scene's first latent is one frame
    chosen = np.concatenate([frames[:num_alone], frames[num_alone + middle :: TEMPORAL_FACTOR]])
    factor = -(-max(frames.shape[1:3]) // FINISHED_PX)
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in chosen])


def film(blocks: Iterable[np.ndarray], fps: int) -> bytes | None:
    """The pictures of a film's blocks, from its first on, as an animated WebP that loops at the film's own speed; None without
    any. All are shown as large as the largest."""
    pictures = [Image.fromarray(picture) for block in blocks for picture in block]
    if not pictures:
        return None
    size = max(picture.size for picture in pictures)
    pictures = [picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=durations_ms(len(pictures), fps), loop=0,
        quality=QUALITY, method=0,
    )  # fmt: skip
    return buffer.getvalue()


def durations_ms(num: int, fps: int) -> list[int]:
    """How long each of a film's latents is seen: the first for one frame, the others for four; rounded so that none drifts."""
    ends = [round(1000 * (1 + TEMPORAL_FACTOR * latent) / fps) for latent in range(num)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
