"""Other files made of a finished video, on demand: its frames as PNGs in a zip, and a copy without the settings in it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from dualparal.errors import OutputError
from dualparal.files import private, written_atomically
from dualparal.media.ffmpeg import run_ffmpeg

FRAMES_S = 1800.0


def frames_zip(video: Path, target: Path) -> Path:
    """Write every frame as `frame_00001.png` ... into the zip `target`, lossless of what the video holds. Raises
    `OutputError`."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".frames.") as made:
        arguments = ["-i", str(video), "-f", "image2", "-start_number", "1", str(Path(made) / "frame_%05d.png")]
        run_ffmpeg(arguments, what=f"taking {video.name} apart", timeout_s=FRAMES_S)
        try:
            with (
                written_atomically(target, is_durable=False) as partial,
                open(partial, "wb", opener=private) as opened,
                zipfile.ZipFile(opened, "w", zipfile.ZIP_STORED) as packed,  # PNGs are compressed already
            ):
                for name in sorted(os.listdir(made)):
                    packed.write(Path(made) / name, name)
        except OSError as error:
            raise OutputError(f"{target.name} cannot be written: {error.strerror}; free space") from None
    return target


def without_settings(video: Path, target: Path) -> Path:
    """Write the same pictures without any metadata: nobody reads in it what was asked for. Raises `OutputError`."""
    try:
        with written_atomically(target) as partial:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600))
            plain = ["-map_metadata", "-1", "-map_metadata:s", "-1", "-map_chapters", "-1", "-fflags", "+bitexact"]
            run_ffmpeg(
                ["-i", str(video), "-map", "0:v", "-c", "copy", *plain, "-movflags", "+faststart", "-f", "mp4", str(partial)],
                what=f"copying {video.name}",
            )
    except OSError as error:
        raise OutputError(f"{target.name} cannot be written: {error.strerror}; free space") from None
    return target
