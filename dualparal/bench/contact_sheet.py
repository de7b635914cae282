"""Contact sheets: many videos on one picture, a row each, frames from first to last.

`python -m dualparal.bench.contact_sheet VIDEOS... --out sheet.png` takes the `.npz` files that `bench quality --keep` writes
("method - prompt.npz", frames [n, side, side, 3] uint8).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LABEL_PX, GAP_PX = 14, 2


def contact_sheet(videos: Mapping[str, np.ndarray], *, num_frames: int = 16, side_px: int = 64) -> Image.Image:
    """One row per video, under its name and with each frame's number; `videos` [n, side, side, 3] uint8 by name."""
    cell = side_px + GAP_PX
    row = LABEL_PX + cell
    sheet = Image.new("RGB", (num_frames * cell, row * len(videos)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (name, video) in enumerate(videos.items()):
        picks = np.linspace(0, len(video) - 1, num_frames).round().astype(int)
        draw.text((1, line * row + 1), f"{name} ({len(video)} frames, shown: {', '.join(map(str, picks))})", fill="black")
        for column, frame in enumerate(picks):
            picture = Image.fromarray(video[frame]).resize((side_px, side_px))
            sheet.paste(picture, (column * cell, line * row + LABEL_PX))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+", help="npz files with an array called frames")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=16, help="how many frames of each")
    args = parser.parse_args(argv)
    contact_sheet({path.stem: np.load(path)["frames"] for path in args.videos}, num_frames=args.frames).save(args.out)
    return 0


if __name__ == "__main__":
    main()
