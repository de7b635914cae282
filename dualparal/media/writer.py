"""From decoded frames to files: one playable segment per block as soon as it is decoded, joined into one mp4 at the end.

Each block becomes an MPEG-TS segment of its own (H.264 yuv420p, an IDR frame first, no B-frames, time stamps that follow the
segment before), so it plays alone, in sequence as HLS, and is joined without being encoded again. The same frames give the
same bytes: one x264 thread, no dates, no encoder state carried from block to block. What `add_block` returned is on disk;
nothing is ever half-written under its final name. Knows no process of the engine and no torch.
"""

from __future__ import annotations

import io
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dualparal import files
from dualparal.errors import OutputError, RequestError
from dualparal.files import BEFORE, checksum_of, is_whole_segment, private, replace_durably, written_atomically
from dualparal.media.ffmpeg import run_ffmpeg
from dualparal.media.metadata import describe, ffmetadata

log = logging.getLogger(__name__)
CRF = "18"  # constant quality, visually near lossless
X264_PRESET = "fast"  # 18 frames/s of 480x832 on one core, 0.7 dB above "veryfast" at a smaller size; denoising is far slower
SLOWEST_PIXELS_PER_S = 50_000  # below this ffmpeg is held to be stuck
# Explicit on both sides: swscale would otherwise convert with bt601, and players would guess from the picture's size.
TO_YUV = (
    "scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=bicubic+accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)

NULL_PACKET = b"\x47\x1f\xff\x10" + b"\xff" * 184  # MPEG-TS stuffing, ignored by players
MIN_PACKETS = 16  # with fewer, ffmpeg cannot tell that a file is MPEG-TS (one frame of 64x64 may take five)

PARTIAL = re.compile(
    r"\.(video\..*|block_\d+\.ts|(sweep|ghost|start|latents(_\d+)?)\.safetensors|start\.png|before\.mp4|\d+\.png|\d+\.jpg\..*|look\.webp\..*)\.part"
)


@dataclass(frozen=True)
class Segment:
    """One finished block on disk: frames [first_frame, first_frame + num_frames) of the video."""

    path: Path
    first_frame: int
    num_frames: int
    duration_s: float
    checksum: str = field(default="", compare=False)  # of the file, where it is known


class VideoWriter:
    """Writes one job's video into `folder`, block by block. `segments` are those a job to be resumed has already."""

    def __init__(
        self,
        folder: Path,
        *,
        width: int,
        height: int,
        fps: int,
        export_images: bool = False,
        segments: Sequence[Segment] = (),
        num_frames_before: int = 0,
    ) -> None:
        """`num_frames_before`: of the film in the folder's `files.BEFORE`, with which the joined video begins."""
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width={width}, height={height}: H.264 in yuv420p needs even sizes of at least 2")
        if fps < 1:
            raise ValueError(f"fps={fps} must be at least 1")
        self.folder, self.width, self.height, self.fps = folder, width, height, fps
        self.export_images, self.num_frames_before = export_images, num_frames_before
        self.segments: list[Segment] = []
        for segment in segments:
            if segment.first_frame != self.num_frames or segment.path.resolve() != self._next_path().resolve():
                raise ValueError(f"{segment} is not {self._next_path()} with first_frame={self.num_frames}")
            self.segments.append(segment)
        make_folder(folder / "frames" if export_images else folder)

    @property
    def num_frames(self) -> int:
        """Frames in the finished segments."""
        return self.segments[-1].first_frame + self.segments[-1].num_frames if self.segments else 0

    def add_block(self, frames: np.ndarray) -> Segment:
        """Encode the next block, uint8 [F, H, W, 3] with F >= 1, and return its segment once it is on disk.

        Raises ValueError for other shapes or types, `OutputError` when it cannot be written.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3) or not len(frames):
            raise ValueError(
                f"a block must be uint8 [F, {self.height}, {self.width}, 3] with F >= 1, "
                f"not {frames.dtype} {list(frames.shape)}"
            )
        segment, encoded = self._encoded(frames)
        if self.export_images:  # before the segment: a segment on disk means its pictures are there too
            for number, frame in enumerate(frames, segment.first_frame):
                write_bytes(self.folder / "frames" / f"{number:06d}.png", _png(frame))
        write_bytes(segment.path, encoded, is_durable=True)
        self.segments.append(segment)
        return segment

    def adopt_block(self, frames: np.ndarray) -> Segment | None:
        """Take the next block from disk if a run before has written it, and its bytes are those of `frames`; else None."""
        if not is_whole_segment(self._next_path()):
            return None
        segment, _ = self._encoded(frames)
        if not is_whole_segment(segment.path, segment.checksum):
            log.warning("%s is damaged and is written anew", segment.path.name)
            return None
        self.segments.append(segment)
        return segment

    def finish(self, settings: str) -> Path | None:
        """Join all segments into `video.mp4` with `settings` in its metadata; None when there is no block.

        The file starts with its index (faststart) and holds exactly the frames before and those of the segments at exactly
        `fps`. May be called again after more blocks. Raises `OutputError`.
        """
        if not self.segments:
            return None
        if damaged := next(
            (one for one in self.segments if one.checksum and not is_whole_segment(one.path, one.checksum)), None
        ):
            raise OutputError(f"{damaged.path.name} has changed on the disk since it was written; resume the job to mend it")
        video = self.folder / "video.mp4"
        remove_partials(self.folder)
        own = secrets.token_hex(4)  # an ffmpeg that outlived its killed writer may still be at another
        partial, listing, tags = (self.folder / f".video.{own}.{kind}.part" for kind in ("mp4", "list", "tags"))
        try:
            write_bytes(listing, self._listing().encode())
            write_bytes(tags, ffmetadata(settings).encode())
            self._join(listing.name, tags.name, partial.name)
            self._check_joined(partial)
            partial.chmod(0o600)
            replace_durably(partial, video)
        except OSError as error:
            raise write_error(video, error) from None
        finally:
            for path in (partial, listing, tags):
                path.unlink(missing_ok=True)
        return video

    def _next_path(self) -> Path:
        return self.folder / f"block_{len(self.segments):04d}.ts"

    def _encoded(self, frames: np.ndarray) -> tuple[Segment, bytes]:
        segment = Segment(self._next_path(), self.num_frames, len(frames), len(frames) / self.fps)
        encoded = self._encode(frames, segment)
        return replace(segment, checksum=checksum_of(encoded)), encoded

    def _encode(self, frames: np.ndarray, segment: Segment) -> bytes:
        picture = [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{self.width}x{self.height}",
            "-r",
            str(self.fps),
            "-i",
            "pipe:0",
        ]
        exact = ["-threads", "1", "-filter_threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact+cgop"]
        codec = ["-vf", TO_YUV, "-c:v", "libx264", "-preset", X264_PRESET, "-crf", CRF, "-bf", "0"]
        times = ["-muxdelay", "0", "-muxpreload", "0", "-output_ts_offset", f"{segment.first_frame / self.fps:.6f}"]
        packets = run_ffmpeg(
            [*picture, *exact, *codec, *times, "-f", "mpegts", "pipe:1"],
            what=f"encoding {segment.path.name}",
            data=np.ascontiguousarray(frames).reshape(-1).data,
            timeout_s=120 + frames.size / SLOWEST_PIXELS_PER_S,
        )
        return packets + NULL_PACKET * (MIN_PACKETS - len(packets) // len(NULL_PACKET))

    def _listing(self) -> str:
        # The durations keep the rate: without them blocks of different lengths drift.
        entries = (f"file '{segment.path.name}'\nduration {segment.duration_s:.6f}\n" for segment in self.segments)
        before = f"file '{BEFORE}'\nduration {self.num_frames_before / self.fps:.6f}\n" if self.num_frames_before else ""
        return "ffconcat version 1.0\n" + before + "".join(entries)

    def _join(self, listing: str, tags: str, target: str) -> None:
        # MPEG-TS counts in 1/90000 s, which 7 or 11 frames per second do not divide: number the frames anew, and let the mp4
        # count in whole frames, to which it rounds. (setts' own time_base option is not heeded when streams are copied.)
        renumber = f"setts=ts=N/{self.fps}/TB:duration=1/{self.fps}/TB"
        inputs = ["-f", "concat", "-i", f"file:{listing}", "-f", "ffmetadata", "-i", f"file:{tags}"]
        copy = ["-map", "0:v", "-map_metadata", "1", "-c", "copy", "-bsf:v", renumber, "-fflags", "+bitexact"]
        run_ffmpeg(
            [*inputs, *copy, "-video_track_timescale", str(self.fps), "-movflags", "+faststart", "-f", "mp4", f"file:{target}"],
            what="joining the blocks into video.mp4",
            folder=self.folder,
            timeout_s=300 + (self.num_frames_before + self.num_frames) / 10,
        )

    def _check_joined(self, joined: Path) -> None:
        try:
            num_frames = describe(joined)["num_frames"]
        except RequestError:
            num_frames = 0
        if num_frames != (expected := self.num_frames_before + self.num_frames):
            raise OutputError(
                f"joining the blocks gave {num_frames} frames where {expected} were written; a segment in "
                f"{self.folder} is damaged or the disk is full: free space or remove the damaged segment, then resume"
            )


def thumbnail(video: Path, target: Path, width: int = 320) -> Path:
    """The first picture of a segment or mp4 as a JPEG at most `width` pixels wide. Raises `OutputError`."""
    shrink = (
        f"scale=w='min({width},iw)':h=-2:in_range=tv:in_color_matrix=bt709:out_range=pc:out_color_matrix=bt601,format=yuvj420p"
    )
    kind = "mpegts" if video.suffix == ".ts" else "mp4"  # never guessed from what is in the file
    arguments = ["-threads", "1", "-f", kind, "-i", f"file:{video.absolute()}", "-frames:v", "1", "-vf", shrink]
    picture = run_ffmpeg(
        [*arguments, "-c:v", "mjpeg", "-threads", "1", "-q:v", "4", "-f", "mjpeg", "pipe:1"],
        what=f"making a thumbnail of {video.name}",
    )
    if not picture:
        raise OutputError(f"making a thumbnail of {video.name} failed: there is no picture in it")
    write_bytes(target, picture)
    return target


def remove_partials(folder: Path) -> None:
    """Remove what a writer that was killed left half-written in a job's folder; only while no other writer is at work there.

    An ffmpeg that still writes to such a file goes on without a name and ends without a trace.
    """
    for pattern in (".*.part", "*/.*.part"):
        files.remove_partials(folder, pattern, is_ours=lambda name: PARTIAL.fullmatch(name) is not None)


def _png(frame: np.ndarray) -> bytes:
    """One frame, uint8 [H, W, 3], as the bytes of a PNG file; little effort, since frames come by the hundred."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents where missing; raises `OutputError`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None


def write_bytes(path: Path, data: bytes, *, is_durable: bool = False) -> None:
    """Write `data` under a temporary name beside `path`, then rename; raises `OutputError` and leaves nothing behind. With
    `is_durable` it survives a power cut."""
    try:
        with written_atomically(path, is_durable=is_durable) as partial, open(partial, "wb", opener=private) as opened:
            opened.write(data)
    except OSError as error:
        raise write_error(path, error) from None


def write_error(path: Path, error: OSError) -> OutputError:
    """`error` as one sentence with the way out."""
    if isinstance(error, OutputError):
        return error
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; free space or make the folder writable, then resume"
    )
