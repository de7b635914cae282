"""Videos from strangers: what is opened, what is made of its end, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from dualparal.errors import OutputError, RequestError
from dualparal.media import film
from dualparal.media.film import Clip, kind_of, last_frames, read_end
from dualparal.method.plan import SETTLING_LATENTS

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1")
KINDS = {
    "h264.mp4": H264,
    "h264 with its index first.mp4": (*H264, "-movflags", "+faststart"),
    "h265 of ten bits.mov": ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none:pools=1"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
}


def made(path: Path, *options: str, size: str = "96x64", fps: float = 25, seconds: float = 2, picture: str = "testsrc") -> Path:
    source = f"{picture}{':' if '=' in picture else '='}size={size}:rate={fps}:duration={seconds}"
    subprocess.run([FFMPEG, "-y", "-loglevel", "error", "-f", "lavfi", "-i", source, *options, str(path)], check=True)
    return path


def counted(path: Path, num_frames: int, size: int = 32, fps: int = 16) -> Path:
    """Frames that get brighter: frame i is grey of 2 i."""
    frames = np.repeat(np.arange(num_frames, dtype=np.uint8) * 2, size * size * 3).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size}x{size}", "-r", str(fps), "-i", "-"]
    subprocess.run([FFMPEG, "-y", "-loglevel", "error", *source, *H264, "-qp", "0", str(path)], input=frames, check=True)
    return path


def end_of(path: Path, num_latents: int = 4, **values: Any) -> Clip:
    return read_end(path, **{"width": 32, "height": 32, "fps": 16, "num_latents": num_latents, **values})


def frames_of(clip: Clip, where: Path, width: int = 32, height: int = 32, most_latents: int = 100) -> np.ndarray:
    (where / "start.mp4").write_bytes(clip.data)
    return last_frames(where / "start.mp4", width, height, most_latents)


@pytest.mark.parametrize(("name", "options"), KINDS.items(), ids=KINDS)
def test_kinds(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    path = made(tmp_path / name, *options)
    assert kind_of(path) == ("matroska" if name.endswith("webm") else "mov")
    clip = end_of(path, width=48, height=32)
    assert clip.num_frames == 29 and clip.num_latents == 8
    assert clip.about == (
        "of the video that is continued 96 x 64 pixels were scaled and cropped to 48 x 32, and 25 frames a second became 16"
    )
    assert frames_of(clip, tmp_path, 48, 32).shape == (29, 32, 48, 3)


def test_the_last_frames_as_they_are(tmp_path: Path) -> None:
    clip = end_of(counted(tmp_path / "a.mp4", 100))
    assert clip.about == "" and clip.num_latents == 4 + SETTLING_LATENTS
    found = frames_of(clip, tmp_path, most_latents=clip.num_latents)
    assert found.shape[0] == clip.num_frames == 4 * clip.num_latents - 3
    expected = 2 * np.arange(100 - len(found), 100)
    assert np.abs(found.mean(axis=(1, 2, 3)) - expected).max() <= 2


def test_a_short_one_and_a_picture(tmp_path: Path) -> None:
    clip = end_of(counted(tmp_path / "a.mp4", 11))
    assert (clip.num_frames, clip.num_latents) == (9, 3)
    assert abs(frames_of(clip, tmp_path)[0].mean() - 4) <= 2, "what is left out is at its beginning"
    clip = end_of(counted(tmp_path / "b.mp4", 4))
    assert (clip.num_frames, clip.num_latents) == (1, 1)
    assert abs(frames_of(clip, tmp_path)[0].mean() - 6) <= 2


def test_cropped_in_the_middle(tmp_path: Path) -> None:
    path = made(tmp_path / "a.mp4", "-vf", "drawbox=x=32:w=32:color=blue:t=fill", *H264, picture="color=c=red", size="96x32")
    middle = frames_of(end_of(path), tmp_path)[:, :, 4:-4]
    assert (middle[..., 2] > 150).all() and (middle[..., 0] < 100).all()


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = made(tmp_path / "a.mp4", *H264, "-vf", "setsar=2", size="48x64")
    assert np.abs(frames_of(end_of(path, width=96, height=64), tmp_path, 96, 64)[0].astype(int)).max() > 100


def test_one_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    source = "testsrc=size=64x64:rate=16:duration=2"
    command = [FFMPEG, "-loglevel", "error", "-f", "lavfi", "-i", source, *KINDS["vp9.webm"], "-live", "1", "-f", "webm", "-"]
    (path := tmp_path / "live.webm").write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    assert end_of(path, 2).num_frames == 29


def torn(tmp_path: Path) -> Path:
    path = made(tmp_path / "torn.mp4", *H264)
    path.write_bytes(path.read_bytes()[:-600])
    return path


def nothing_behind_its_head(tmp_path: Path) -> Path:
    (path := tmp_path / "head.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\xff" * 5000)
    return path


def a_playlist(tmp_path: Path) -> Path:
    (path := tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    return path


def a_list_behind_a_head(tmp_path: Path) -> Path:
    (path := tmp_path / "list.mp4").write_bytes(b"\0\0\0\x10ftypffconcat version 1.0\nfile /etc/passwd\n")
    return path


def without_pictures(tmp_path: Path) -> Path:
    path = tmp_path / "tone.mp4"
    subprocess.run([FFMPEG, "-loglevel", "error", "-f", "lavfi", "-i", "sine=duration=1", str(path)], check=True)
    return path


REFUSED = {
    "another codec": (lambda where: made(where / "a.mp4", "-c:v", "mpeg4"), "nothing could be read of it"),
    "another container": (lambda where: made(where / "a.mkv", *H264), "neither mp4, mov nor webm"),
    "avi": (lambda where: made(where / "a.avi", "-c:v", "mpeg4"), "neither mp4, mov nor webm"),
    "torn": (torn, "nothing could be read of it"),
    "a head alone": (nothing_behind_its_head, "nothing could be read of it"),
    "a playlist": (a_playlist, "neither mp4, mov nor webm"),
    "a list": (a_list_behind_a_head, "nothing could be read of it"),
    "sound alone": (without_pictures, "nothing could be read of it"),
    "tiny": (lambda where: made(where / "a.mp4", *H264, size="8x8"), "it has 8 x 8 pixels; give one of at least 16 x 16"),
    "a folder": (lambda where: where, "neither a job nor a file of this name"),
    "no file": (lambda where: where / "b.mp4", "neither a job nor a file of this name"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        end_of(make(tmp_path))
    assert said in str(caught.value) and str(caught.value).startswith("continue_from: ") and "\n" not in str(caught.value)
    assert caught.value.field == "continue_from" and "passwd" not in str(caught.value)


def test_nothing_is_started_for_what_is_refused_by_its_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, video = a_playlist(tmp_path), counted(tmp_path / "a.mp4", 4)

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(RequestError):
        end_of(path)
    monkeypatch.setattr(film, "MAX_BYTES", 100)
    with pytest.raises(RequestError, match="the file has more than"):
        end_of(video)


def test_one_that_takes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = made(tmp_path / "a.mp4", *H264)
    with monkeypatch.context() as patched:
        patched.setattr(film, "MAX_PIXELS", 1000)
        with pytest.raises(RequestError, match="nothing could be read of it within its limits"):
            end_of(video)
    source = film.PROCESS.read_text()
    for limit, less in (("3 * 2**30", "2**24"), ("MAX_CPU_S = 240", "MAX_CPU_S = 0")):
        assert limit in source
        (small := tmp_path / "small.py").write_text(source.replace(limit, less))
        with monkeypatch.context() as patched:
            patched.setattr(film, "PROCESS", small)
            with pytest.raises(RequestError, match="nothing could be read of it within its limits"):
                end_of(video)
    (slow := tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(film, "PROCESS", slow)
    monkeypatch.setattr(film, "TIMEOUT_S", 0.5)
    with pytest.raises(RequestError, match="nothing could be read of it within its limits"):
        end_of(video)


def test_the_program_writes_no_more_than_it_may(tmp_path: Path) -> None:
    arguments = ["-loglevel", "quiet", "-f", "lavfi", "-i", "testsrc=duration=1", "-c:v", "rawvideo", "-f", "rawvideo"]
    out = tmp_path / "out.raw"
    command = ["python", "-P", str(film.PROCESS), FFMPEG, "100000", *arguments, str(out)]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    assert out.stat().st_size <= 100_000


def test_a_clip_that_is_damaged(tmp_path: Path) -> None:
    (clip := tmp_path / "start.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(OutputError):
        last_frames(clip, 32, 32, 4)
