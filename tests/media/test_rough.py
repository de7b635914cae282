"""Early looks as bytes: what is packed comes out again, a film plays at its own speed, and what is none of ours is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dualparal.media.rough import COLUMNS, FINISHED_PX, MAX_PICTURES, durations_ms, film, pack, shrink, unpack


def gradients(num: int, height: int = 24, width: int = 40) -> np.ndarray:
    """Each picture of another colour, soft enough for a JPEG."""
    ramp = np.linspace(0, 60, width)[None, None, :, None] + np.linspace(0, 40, height)[None, :, None, None]
    colours = np.random.default_rng(0).integers(20, 150, (num, 1, 1, 3))
    return (ramp + colours).astype(np.uint8)


@pytest.mark.parametrize("num", [1, 3, COLUMNS, COLUMNS + 1, 40])
def test_what_is_packed_comes_out_again(num: int) -> None:
    pictures = gradients(num)
    found = unpack(pack(pictures))
    assert found.shape == pictures.shape
    assert np.abs(found.astype(int) - pictures).mean() < 6
    assert len(pack(pictures)) < 600 * num + 1500


def test_a_block_of_any_length_fits() -> None:
    assert len(unpack(pack(np.zeros((3 * MAX_PICTURES, 8, 8, 3), np.uint8)))) == MAX_PICTURES


def test_what_is_none_of_ours_is_refused() -> None:
    def jpeg(comment: str) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (17, 9)).save(buffer, "JPEG", comment=comment)
        return buffer.getvalue()

    whole = pack(gradients(3))
    for data in (b"", b"GIF89a", whole[: len(whole) // 2], jpeg("x"), jpeg("0"), jpeg("-3"), jpeg("3"), jpeg(str(10**30))):
        with pytest.raises(ValueError):
            unpack(data)


def test_a_film_plays_at_its_own_speed() -> None:
    first, second = gradients(3, 12, 20), gradients(8, 24, 40)
    data = film([first, second], fps=16)
    assert data is not None
    image = Image.open(io.BytesIO(data))
    assert image.format == "WEBP" and image.size == (40, 24) and image.n_frames == 11 and image.info["loop"] == 0
    reported = []
    for number in range(image.n_frames):
        image.seek(number)
        image.load()
        reported.append(image.info["duration"])
    assert reported == durations_ms(11, 16)
    assert film([], fps=16) is None


@pytest.mark.parametrize("fps", [7, 16, 24])
def test_durations_do_not_drift(fps: int) -> None:
    for num in (1, 2, 41, 241):
        assert sum(durations_ms(num, fps)) == round(1000 * (4 * num - 3) / fps)


@pytest.mark.parametrize(("num_frames", "num"), [(1, 1), (9, 3), (8, 2), (45, 12)])
def test_a_finished_block_has_a_picture_for_each_latent(num_frames: int, num: int) -> None:
    frames = np.zeros((num_frames, 480, 832, 3), np.uint8)
    found = shrink(frames)
    assert len(found) == num and max(found.shape[1:3]) <= FINISHED_PX
    small = shrink(frames[:, :64, :64])
    assert small.shape[1:3] == (64, 64)
