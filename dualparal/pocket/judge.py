"""Judge long videos and sets of videos from what `metrics.py` read: seams, drift, repetition, diversity.

Each function returns plain numbers, for a video or for a set; averages and intervals are the bench's business. Latent k >= 1
covers frames 4k - 3 .. 4k, so a block that starts with latent k starts with frame 4k - 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualparal.pocket.metrics import Reading, velocities
from dualparal.pocket.world import BACKGROUNDS, BOUNCE_PERIOD, CIRCLE_PERIOD, COLORS, SIDE_PX, Prompt

SAME_FRAME = 0.03  # two frames count as the same below this share of the difference that an object elsewhere makes
MAX_LAG = 96


def block_borders(block_latents: Sequence[int]) -> list[int]:
    """First frame of every block but the first, from the blocks' lengths in latents."""
    return [4 * int(k) - 3 for k in np.cumsum(block_latents)[:-1]]


def jumps(reading: Reading, borders: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Changes around block borders and around all other borders between latents, as (at block borders, inside blocks).

    position: the largest change of velocity within two frames, in pixels per frame; velocity: the change of the mean
    velocity over four frames; size: the relative change of area; color: the change of the object's colour (0 .. 1). NaN
    where the object was not seen.
    """
    steps = velocities(reading.center_px)  # steps[i] leads to frame i + 1
    turn = np.linalg.norm(np.diff(steps, axis=0), axis=1)  # turn[i] is between the steps to frames i + 1 and i + 2
    area, rgb = reading.area_px, reading.color_rgb
    values: dict[str, list[tuple[bool, float]]] = {"position": [], "velocity": [], "size": [], "color": []}
    for frame in range(5, len(area) - 5, 4):
        is_border = frame in borders
        before, after = steps[frame - 4 : frame], steps[frame : frame + 4]
        values["position"].append((is_border, float(turn[frame - 3 : frame + 1].max())))
        values["velocity"].append((is_border, float(np.linalg.norm(after.mean(axis=0) - before.mean(axis=0)))))
        mean_area = (area[frame] + area[frame - 1]) / 2
        size = abs(area[frame] - area[frame - 1]) / mean_area if mean_area else np.nan
        values["size"].append((is_border, float(size)))
        values["color"].append((is_border, float(np.linalg.norm(rgb[frame] - rgb[frame - 1]))))
    return {
        name: (np.asarray([v for b, v in pairs if b]), np.asarray([v for b, v in pairs if not b]))
        for name, pairs in values.items()
    }


def palette_error(reading: Reading, prompt: Prompt) -> np.ndarray:
    """Per frame, how far object and background are from the colours asked for: mean of both distances in RGB (0 .. 1)."""
    color = np.asarray(COLORS[prompt.color]) / 255
    background = np.asarray(BACKGROUNDS[prompt.background]) / 255
    of_object = np.linalg.norm(reading.color_rgb - color, axis=1)
    of_object[np.isnan(of_object)] = np.linalg.norm(
        color - background
    )  # no object: as wrong as painting it in the background's colour
    return np.asarray((of_object + np.linalg.norm(reading.background_rgb - background, axis=1)) / 2)


def drift(reading: Reading, prompt: Prompt) -> dict[str, float]:
    """Palette error in the first and last quarter, and the last quarter's size relative to the first's."""
    quarter = max(1, len(reading.area_px) // 4)
    error = palette_error(reading, prompt)
    first_area = float(reading.area_px[:quarter].mean())
    return {
        "palette_first": float(error[:quarter].mean()),
        "palette_last": float(error[-quarter:].mean()),
        "size_ratio": float(reading.area_px[-quarter:].mean()) / first_area if first_area else float("nan"),
    }


def repetition(video: np.ndarray, prompt: Prompt) -> float:
    """The largest share of frames that equal the frame `lag` earlier, over all lags up to 96 at which the asked motion does
    not repeat by itself: near 0 for a moving object (a bounce rests a moment at its top), 1 for a frozen picture or a loop
    of the wrong length."""
    period = CIRCLE_PERIOD if prompt.motion == "circling" else BOUNCE_PERIOD
    frames = video.astype(np.float32) / (255 if video.dtype == np.uint8 else 1)
    back = np.median(frames, axis=(1, 2), keepdims=True)
    elsewhere = 2 * np.abs(frames - back).mean(axis=(1, 2, 3)) + 1e-6
    worst = 0.0
    for lag in range(1, min(MAX_LAG, len(frames) // 2) + 1):
        if min(lag % period, -lag % period) <= 2 and lag > 2:
            continue
        difference = np.abs(frames[lag:] - frames[:-lag]).mean(axis=(1, 2, 3))
        worst = max(worst, float((difference < SAME_FRAME * elsewhere[lag:]).mean()))
    return worst


def diversity(readings: Sequence[Reading]) -> dict[str, float]:
    """How different videos of one prompt are: mean distance between two objects' places at the same frame (pixels, on the
    torus), and the standard deviation of their sizes relative to the mean size."""
    length = min(len(r.area_px) for r in readings)
    distances = []
    for i, a in enumerate(readings):
        for b in readings[i + 1 :]:
            offset = (a.center_px[:length] - b.center_px[:length] + SIDE_PX / 2) % SIDE_PX - SIDE_PX / 2
            distances.append(float(np.nanmean(np.linalg.norm(offset, axis=1))))
    sizes = np.asarray([r.area_px.mean() for r in readings])
    return {"place_px": float(np.mean(distances)), "size": float(sizes.std() / sizes.mean())}
