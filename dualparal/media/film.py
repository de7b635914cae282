"""Videos from strangers, to be gone on from: what kind of file it is, its first bytes say here, in plain Python; an ffmpeg that
has little memory and little time (`film_process`) makes of its end a short clip of the film's own size and rate.

The clip is H.264 without loss, so that what is encoded later are the pixels that were seen here. Follows the file type box of
ISO 14496-12 (mp4, mov) and the EBML header (webm). Of containers and codecs those that were asked for are tried and no others.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.errors import OutputError, RequestError
from dualparal.media.ffmpeg import ffmpeg_path, run_ffmpeg
from dualparal.method.plan import SETTLING_LATENTS
from dualparal.paths import is_file, why_missing
from dualparal.request import TEMPORAL_FACTOR, frames_of_latents

if TYPE_CHECKING:
    import numpy as np

FIELD = "continue_from"
MAX_BYTES = 2**31
MAX_PIXELS = 36 * 10**6  # of a frame: 8K
MIN_SIDE_PX = 16
TIMEOUT_S = 300.0
PROCESS = Path(__file__).with_name("film_process.py")
CODECS = "h264,hevc,vp9"
QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
EBML = b"\x1a\x45\xdf\xa3"
WAY_OUT = "give an mp4, mov or webm with H.264, H.265 or VP9"
SIZE = re.compile(rb"Stream #.*?Video: .*? ([0-9]{1,6})x([0-9]{1,6})[ ,\[].*")
RATE = re.compile(rb"([0-9.]{1,12}) (?:fps|tbr)")
FRAMES = re.compile(rb"^frame=\s*([0-9]{1,9})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Clip:
    """The end of a video: an mp4 of `num_frames` frames (4k + 1), and what was done to make it fit ("" for nothing)."""

    data: bytes
    num_frames: int
    about: str

    @property
    def num_latents(self) -> int:
        return 1 + (self.num_frames - 1) // TEMPORAL_FACTOR


def read_end(path: Path, *, width: int, height: int, fps: int, num_latents: int) -> Clip:
    """The end of the video in the file at `path`, scaled and cropped to `width` x `height`, at `fps` frames a second: what
    `num_latents` latent frames and those before them are encoded from, or all of a shorter one. Raises `RequestError`."""
    kind = kind_of(path)
    most_frames = frames_of_latents(num_latents + SETTLING_LATENTS)
    with tempfile.TemporaryDirectory(prefix="dualparal-") as folder:
        out = Path(folder) / "end.mp4"
        arguments = [
            "-map", "0:v:0", "-an", "-sn", "-dn", "-vf",
            f"fps={fps},scale=iw*sar:ih,setsar=1,scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos,"
            f"crop={width}:{height}", "-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-pix_fmt", "yuv420p",
            "-threads", "1", "-map_metadata", "-1", "-map_chapters", "-1", "-f", "mp4", str(out),
        ]  # fmt: skip
        most_bytes = 3 * width * height * (most_frames + 2 * fps) + 2**20
        # Whole seconds more than are needed: frames may be missing, and rates odd.
        told = _run(path, kind, ["-sseof", f"-{most_frames / fps + 1:.3f}"], arguments, most_bytes)
        if told is None or not _num_frames(told):  # a file that does not say how long it is
            told = _run(path, kind, [], arguments, most_bytes)
        found = None if told is None else SIZE.search(told)
        if told is None or found is None or not (num_frames := _num_frames(told)):
            raise _refused(f"nothing could be read of it within its limits; {WAY_OUT} that other programs can open")
        size = int(found[1]), int(found[2])
        if min(size) < MIN_SIDE_PX:
            raise _refused(f"it has {size[0]} x {size[1]} pixels; give one of at least {MIN_SIDE_PX} x {MIN_SIDE_PX}")
        rate = RATE.search(found[0])
        num_frames = min(most_frames, (num_frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
        return Clip(out.read_bytes(), num_frames, _about(size, (width, height), rate and float(rate[1]), fps))


def last_frames(clip: Path, width: int, height: int, most_latents: int) -> np.ndarray:
    """Of a `Clip` that was put into a file: its last frames, 4k + 1 and for at most so many latents, uint8 [F, H, W, 3]. Raises
    `OutputError`."""
    import numpy as np  # for rank 0 alone: the command line waits for it

    arguments = ["-i", str(clip), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = np.frombuffer(run_ffmpeg(arguments, what=f"opening {clip.name}", timeout_s=TIMEOUT_S), np.uint8)
    frames = pixels[: pixels.size // (width * height * 3) * (width * height * 3)].reshape(-1, height, width, 3)
    if not len(frames):
        raise OutputError(f"{clip.name} has no frames")
    count = min(frames_of_latents(most_latents), (len(frames) - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
    return frames[-count:].copy()


def kind_of(path: Path) -> str:
    """ffmpeg's name for the container that the file says it is. Raises `RequestError`."""
    if not is_file(path):
        raise _refused(f"there is neither a job nor a file of this name{why_missing(path)}")
    try:
        with open(path, "rb") as opened:
            head, num_bytes = opened.read(64), opened.seek(0, 2)
    except OSError as error:
        raise _refused(f"the file cannot be read ({error.strerror})") from None
    if num_bytes > MAX_BYTES:
        raise _refused(f"the file has more than {MAX_BYTES // 2**20} MiB; give its last seconds alone")
    if head[4:8] in QUICKTIME:
        return "mov"
    if head.startswith(EBML) and b"webm" in head:
        return "matroska"
    raise _refused(f"the file is neither mp4, mov nor webm; {WAY_OUT}")


def _run(path: Path, kind: str, seek: list[str], arguments: list[str], most_bytes: int) -> bytes | None:
    """What ffmpeg has to say of the file, and how far it got; None when it gave up or was stopped."""
    try:
        ffmpeg = ffmpeg_path()
        command = [
            sys.executable, "-P", str(PROCESS), ffmpeg, str(most_bytes), "-hide_banner", "-nostdin", "-nostats", "-y",
            "-loglevel", "info", "-progress", "pipe:1", "-protocol_whitelist", "file", "-codec_whitelist", CODECS,
            "-max_pixels", str(MAX_PIXELS), "-threads", "1", *seek, "-f", kind, "-i", f"file:{path}", *arguments,
        ]  # fmt: skip
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    except OutputError as error:
        raise _refused(str(error)) from None
    except OSError as error:
        raise _refused(f"nothing can be started to open it ({error.strerror}); free memory") from None
    return None if done.returncode else done.stderr + b"\n" + done.stdout


def _num_frames(told: bytes) -> int:
    """How many frames were written."""
    return int(found[-1]) if (found := FRAMES.findall(told)) else 0


def _about(size: tuple[int, int], wanted: tuple[int, int], rate: float | None, fps: int) -> str:
    changes = []
    if size != wanted:
        changes.append(f"{size[0]} x {size[1]} pixels were scaled and cropped to {wanted[0]} x {wanted[1]}")
    if rate is not None and abs(rate - fps) > 0.01:
        changes.append(f"{rate:g} frames a second became {fps}")
    return "of the video that is continued " + ", and ".join(changes) if changes else ""


def _refused(why: str) -> RequestError:
    return RequestError(f"{FIELD}: {why}", FIELD)
