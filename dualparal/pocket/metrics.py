"""Read a video of the procedural world back: what is on each frame, where, and how it moves.

Only pixels are looked at. `read_frames` finds, frame by frame, the background, the object's colour, shape, place and size;
`classify_motion` names the motion of a track; `adherence` compares both with a prompt. Pure numpy. Videos are [frames, side,
side, 3], uint8 or float in 0 .. 1; any square size: places and sizes are returned in pixels of the world's 64 x 64 picture.
Checked against rendered scenes and against deliberately broken videos in tests/pocket/test_metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dualparal.pocket.world import BACKGROUNDS, COLORS, SHAPES, SIDE_PX, VELOCITY, Prompt, draw_masks

MIN_AREA_SHARE = 0.01  # less than this of the picture is no object
MIN_CONTRAST = 0.18  # distance in RGB (0 .. 1) from the background for a pixel to count
MAX_NAME_DISTANCE = 0.30  # farther from every named colour is no colour of this world
AREA_OF_UNIT_RADIUS = {"circle": np.pi, "square": 1.8**2, "triangle": 3 * 3**0.5 * 0.65**2}


@dataclass(frozen=True)
class Reading:
    """What was read, per frame; where no object is seen names are "" and places NaN."""

    background: list[str]
    color: list[str]
    shape: list[str]
    background_rgb: np.ndarray  # [frames, 3], 0 .. 1
    color_rgb: np.ndarray  # [frames, 3]
    center_px: np.ndarray  # [frames, 2], x and y on the torus
    area_px: np.ndarray  # [frames]
    residual: np.ndarray  # [frames], mean absolute difference from "one flat object on a flat background"

    @property
    def is_seen(self) -> np.ndarray:
        return ~np.isnan(self.center_px[:, 0])

    def part(self, start: int, stop: int) -> Reading:
        """The same for frames start .. stop - 1."""
        cut = slice(start, stop)
        return Reading(
            self.background[cut], self.color[cut], self.shape[cut], self.background_rgb[cut], self.color_rgb[cut],
            self.center_px[cut], self.area_px[cut], self.residual[cut],
        )  # fmt: skip


def nearest_name(rgb: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str:
    """The named colour nearest to `rgb` (0 .. 1), or "" if none is near."""
    table = np.asarray(list(names.values()), np.float64) / 255
    distance = np.linalg.norm(table - rgb, axis=1)
    return list(names)[int(distance.argmin())] if distance.min() < MAX_NAME_DISTANCE else ""


def read_frames(video: np.ndarray) -> Reading:
    """Read every frame on its own; raises ValueError for anything but square RGB frames."""
    if video.ndim != 4 or video.shape[3] != 3 or video.shape[1] != video.shape[2]:
        raise ValueError(f"expected [frames, side, side, 3], got {video.shape}")
    frames = video.astype(np.float64) / (255 if video.dtype == np.uint8 else 1)
    rows = [_read_frame(frame) for frame in frames]
    columns = list(zip(*rows, strict=True))
    return Reading(list(columns[0]), list(columns[1]), list(columns[2]), *(np.asarray(c, np.float64) for c in columns[3:]))


def _read_frame(frame: np.ndarray) -> tuple[str, str, str, np.ndarray, np.ndarray, np.ndarray, float, float]:
    back = np.median(frame.reshape(-1, 3), axis=0)
    difference = frame - back
    contrast = np.linalg.norm(difference, axis=2)
    background = nearest_name(back, BACKGROUNDS)
    nothing = (background, "", "", back, np.full(3, np.nan), np.full(2, np.nan), 0.0, float(np.abs(difference).mean()))
    is_object = contrast > MIN_CONTRAST
    if is_object.mean() < MIN_AREA_SHARE:
        return nothing
    core = contrast >= 0.6 * np.quantile(contrast[is_object], 0.75)
    color = np.median(frame[core], axis=0)
    axis = color - back
    alpha = np.clip(difference @ axis / (axis @ axis), 0, 1)
    alpha[contrast < 0.5 * MIN_CONTRAST] = 0
    scale = SIDE_PX / frame.shape[0]
    area = float(alpha.sum()) * scale**2
    if area < MIN_AREA_SHARE * SIDE_PX**2:
        return nothing
    center = _torus_center(alpha)
    residual = float(np.abs(difference - alpha[..., None] * axis).mean())
    return (background, nearest_name(color, COLORS), _shape_of(alpha, center, area, scale), back, color, center, area, residual)


def _torus_center(alpha: np.ndarray) -> np.ndarray:
    """The centre of mass (x, y) on the torus, in world pixels: a circular mean, refined by the plain mean around it."""
    side = alpha.shape[0]
    grid = np.arange(side) + 0.5
    turn = np.exp(2j * np.pi * grid / side)
    center = []
    for weights in (alpha.sum(axis=0), alpha.sum(axis=1)):
        rough = np.angle(weights @ turn) / (2 * np.pi) * side
        offset = (grid - rough + side / 2) % side - side / 2
        center.append((rough + (weights * offset).sum() / weights.sum()) % side * SIDE_PX / side)
    return np.asarray(center)


def _shape_of(alpha: np.ndarray, center: np.ndarray, area: float, scale: float) -> str:
    """The shape whose drawing at that place and of that area is nearest."""
    if scale != 1:
        step = alpha.shape[0] // SIDE_PX
        if step < 1 or alpha.shape[0] % SIDE_PX:
            return ""
        alpha = alpha.reshape(SIDE_PX, step, SIDE_PX, step).mean(axis=(1, 3))
    errors = [np.square(draw_masks(s, center[None], (area / AREA_OF_UNIT_RADIUS[s]) ** 0.5)[0] - alpha).sum() for s in SHAPES]
    return SHAPES[int(np.argmin(errors))] if min(errors) < 0.35 * area else ""


def velocities(center_px: np.ndarray) -> np.ndarray:
    """Steps [frames - 1, 2] in pixels per frame, the short way round the torus; NaN where the object was not seen."""
    half = SIDE_PX / 2
    return (np.diff(center_px, axis=0) + half) % SIDE_PX - half


def classify_motion(center_px: np.ndarray) -> str:
    """The motion of a track of some 32 frames or more, or "" if it is none of this world's (too slow, jumping, or
    undecided)."""
    steps = velocities(center_px)
    seen = steps[~np.isnan(steps).any(axis=1)]
    if len(seen) < 0.7 * len(steps) or len(seen) < 8:
        return ""
    speed = np.linalg.norm(seen, axis=1)
    mean = np.clip(seen, -8, 8).mean(axis=0)
    if speed.mean() < 0.7 or np.mean(speed > 8) > 0.1:
        return ""
    straightness = np.linalg.norm(mean) / speed.mean()
    if straightness > 0.75:
        name, velocity = max(VELOCITY.items(), key=lambda item: float(np.dot(item[1], mean)))
        return name if np.dot(velocity, mean) / np.linalg.norm(velocity) > 0.9 * np.linalg.norm(mean) else ""
    spread = np.sqrt(np.square(seen).mean(axis=0))
    if spread[0] < 0.35 * spread[1]:
        return "bouncing"
    smooth = np.stack([np.convolve(seen[:, k], np.ones(5) / 5, "valid") for k in (0, 1)], axis=1)
    turn = smooth[:-4, 0] * smooth[4:, 1] - smooth[:-4, 1] * smooth[4:, 0]
    is_round = spread.min() > 0.4 * spread.max() and np.mean(turn > 0) > 0.75
    return "circling" if is_round else ""


def adherence(reading: Reading, prompt: Prompt, *, window: int = 48) -> dict[str, float]:
    """The share of frames (of windows, for motion) that show what the prompt asks for: color, shape, background, motion, and
    `all` (windows in which the motion is right and every other attribute in at least 90 % of frames)."""
    num_frames = len(reading.color)
    window = min(window, num_frames)
    starts = range(0, num_frames - window + 1, max(1, window // 2))
    right = {
        "color": np.asarray([c == prompt.color for c in reading.color]),
        "shape": np.asarray([s == prompt.shape for s in reading.shape]),
        "background": np.asarray([b == prompt.background for b in reading.background]),
    }
    motion = np.asarray([classify_motion(reading.center_px[s : s + window]) == prompt.motion for s in starts])
    rest = np.asarray([all(r[s : s + window].mean() >= 0.9 for r in right.values()) for s in starts])
    return {
        **{k: float(v.mean()) for k, v in right.items()},
        "motion": float(motion.mean()),
        "all": float((motion & rest).mean()),
    }
