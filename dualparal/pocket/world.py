"""The world Pocket Wan lives in: one coloured shape that moves on a flat background.

Everything a video holds is known (`Scene`), so a generated video can be judged by reading it back (`metrics.py`). Pure
numpy: the page may import this file for its example prompts. It knows nothing of torch, of training or of the model.

Positions are in pixels of a 64 x 64 picture that is a torus: a shape that leaves on one side comes back on the other. Time
is in frames at 16 frames a second. The picture is rendered with antialiased edges, so that sub-pixel motion is visible.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

SIDE_PX = 64
FPS = 16
SPEED_PX = 2.0  # pixels per frame of all four directions, and nearly that of circling
BOUNCE_PERIOD, BOUNCE_HEIGHT_PX, FLOOR_PX = 32, 32.0, 51.0
CIRCLE_PERIOD, CIRCLE_RADIUS_PX = 48, 14.0
RADIUS_PX = (10.0, 12.5)

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 175, 60),
    "blue": (45, 100, 240),
    "yellow": (245, 220, 50),
    "orange": (245, 135, 25),
    "purple": (145, 50, 190),
    "cyan": (60, 205, 225),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "white": (243, 243, 243),
    "grey": (128, 128, 128),
    "navy": (18, 28, 90),
    "brown": (105, 65, 35),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "bouncing", "circling")
VELOCITY: dict[str, tuple[float, float]] = {
    "moving left": (-SPEED_PX, 0.0),
    "moving right": (SPEED_PX, 0.0),
    "moving up": (0.0, -SPEED_PX),
    "moving down": (0.0, SPEED_PX),
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The four attributes a caption names."""

    color: str
    shape: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("color", self.color, COLORS),
            ("shape", self.shape, SHAPES),
            ("motion", self.motion, MOTIONS),
            ("background", self.background, BACKGROUNDS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not in this world; it knows {', '.join(allowed)}")

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} {self.motion} on a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> Prompt:
        """Read a caption back; raises ValueError where it is not one of this world's."""
        words = caption.lower().replace(",", " ").replace(".", " ").split()
        text = " ".join(words)
        motion = next((m for m in MOTIONS if m in text), "")
        return cls(
            color=next((w for w in words if w in COLORS), ""),
            shape=next((w for w in words if w in SHAPES), ""),
            motion=motion,
            background=next((w for w in words if w in BACKGROUNDS), ""),
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A prompt and what it leaves open. `x_px`, `y_px`: the place at frame 0 (the orbit's centre for circling); `phase`:
    where in its cycle a bouncing or circling object is at frame 0, in cycles; `radius_px`: the size."""

    prompt: Prompt
    x_px: float
    y_px: float
    phase: float
    radius_px: float

    def centers(self, num_frames: int) -> np.ndarray:
        """The object's centre in each frame: [num_frames, 2] as (x, y) in pixels, wrapped to the picture."""
        t = np.arange(num_frames, dtype=np.float64)
        motion = self.prompt.motion
        if motion in VELOCITY:
            vx, vy = VELOCITY[motion]
            x, y = self.x_px + vx * t, self.y_px + vy * t
        elif motion == "bouncing":
            u = (t / BOUNCE_PERIOD + self.phase) % 1.0
            x, y = np.full_like(t, self.x_px), FLOOR_PX - BOUNCE_HEIGHT_PX * 4.0 * u * (1.0 - u)
        else:
            angle = 2 * math.pi * (t / CIRCLE_PERIOD + self.phase)  # clockwise on screen: y points down
            x, y = self.x_px + CIRCLE_RADIUS_PX * np.cos(angle), self.y_px + CIRCLE_RADIUS_PX * np.sin(angle)
        return np.stack([x, y], axis=1) % SIDE_PX

    def render(self, num_frames: int) -> np.ndarray:
        """Frames 0 .. num_frames - 1 as float32 [num_frames, 64, 64, 3] in 0 .. 1."""
        masks = draw_masks(self.prompt.shape, self.centers(num_frames), self.radius_px)[..., None]
        front = np.asarray(COLORS[self.prompt.color], np.float32) / 255
        back = np.asarray(BACKGROUNDS[self.prompt.background], np.float32) / 255
        return np.asarray(back + masks * (front - back), np.float32)


def draw_masks(shape: str, centers: np.ndarray, radius_px: float) -> np.ndarray:
    """How much of each pixel the shape covers: [num_frames, 64, 64] in 0 .. 1, from centres [num_frames, 2]."""
    grid = np.arange(SIDE_PX, dtype=np.float32) + 0.5
    half = SIDE_PX / 2
    x = (grid[None, :] - centers[:, :1] + half) % SIDE_PX - half  # [num_frames, 64]
    y = (grid[None, :] - centers[:, 1:] + half) % SIDE_PX - half
    dx, dy = x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32)
    if shape == "circle":
        distance = np.sqrt(dx**2 + dy**2) - radius_px
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius_px
    else:  # upright, equilateral, centred on its centroid
        distance = np.maximum(np.abs(dx) * 0.8660254 - dy * 0.5, dy) - 0.65 * radius_px
    return np.clip(0.5 - distance, 0.0, 1.0)


def all_prompts() -> list[Prompt]:
    """Every combination of this world, in a fixed order."""
    return [
        Prompt(color=c, shape=s, motion=m, background=b)
        for c, s, m, b in itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS)
    ]


def held_out_prompts() -> list[Prompt]:
    """The tenth of all combinations that no training ever sees; every word occurs among them and outside."""
    prompts = all_prompts()
    chosen = np.random.default_rng(20260).permutation(len(prompts))[: len(prompts) // 10]
    return [prompts[i] for i in sorted(chosen)]


def training_prompts() -> list[Prompt]:
    """All combinations but the held-out ones."""
    held_out = set(held_out_prompts())
    return [p for p in all_prompts() if p not in held_out]


def random_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene of that prompt with everything else drawn at random, so that any moment of a motion can be a video's first."""
    x_px, y_px = rng.uniform(0, SIDE_PX, 2)
    if prompt.motion == "bouncing":
        x_px = rng.uniform(17, SIDE_PX - 17)
    elif prompt.motion == "circling":
        x_px, y_px = rng.uniform(SIDE_PX / 2 - 1, SIDE_PX / 2 + 1, 2)
    elif prompt.motion in ("moving left", "moving right"):
        y_px = rng.uniform(17, SIDE_PX - 15)
    else:
        x_px = rng.uniform(17, SIDE_PX - 17)
    return Scene(prompt=prompt, x_px=x_px, y_px=y_px, phase=float(rng.uniform()), radius_px=float(rng.uniform(*RADIUS_PX)))
