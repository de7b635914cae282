"""Segments and mp4: every promised frame is there, at the right time, in the right colour, or nothing is."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualparal.errors import OutputError
from dualparal.media import writer as writer_module
from dualparal.media.ffmpeg import ffmpeg_path, run_ffmpeg
from dualparal.media.metadata import describe
from dualparal.media.writer import Segment, VideoWriter, thumbnail


def moving_shapes(num_frames: int, height: int, width: int, first_frame: int = 0) -> np.ndarray:
    """Smooth moving colours, uint8 [F, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    times = np.arange(first_frame, first_frame + num_frames)[:, None, None]
    waves = (np.sin((x + 3 * times) / 7), np.cos((y - 2 * times) / 9), np.sin((x + y) / 11 + times / 5))
    return np.stack([(127 + 100 * wave).astype(np.uint8) for wave in waves], axis=-1)


def decode(video: Path, height: int, width: int) -> np.ndarray:
    """All pictures of a file, as a player shows them, uint8 [F, H, W, 3]."""
    scale = "scale=in_color_matrix=bt709:in_range=tv:flags=accurate_rnd+full_chroma_int"
    raw = run_ffmpeg(
        ["-i", f"file:{video}", "-fps_mode", "passthrough", "-vf", scale, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
        what="decoding",
    )
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def packets(video: Path) -> list[dict[str, str]]:
    """Lines of framecrc: dts, pts, duration in the file's own ticks; `S`/`F` flags ('K' when a key frame)."""
    lines = run_ffmpeg(["-copyts", "-i", f"file:{video}", "-c", "copy", "-f", "framecrc", "pipe:1"], what="listing").decode()
    tick = next(line.split()[-1] for line in lines.splitlines() if line.startswith("#tb"))
    rows = [[cell.strip() for cell in line.split(",")] for line in lines.splitlines() if not line.startswith("#")]
    return [{"tick": tick, "dts": row[1], "pts": row[2], "duration": row[3], "key": "F=0x0" not in row} for row in rows]


def write(folder: Path, lengths: tuple[int, ...], *, size: tuple[int, int] = (32, 32), fps: int = 16) -> VideoWriter:
    height, width = size
    writer = VideoWriter(folder, width=width, height=height, fps=fps)
    for length in lengths:
        writer.add_block(moving_shapes(length, height, width, writer.num_frames))
    return writer


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond `num_bytes` fails, for us and for the programs we start, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fps", [1, 7, 16, 24, 59, 120])
@pytest.mark.parametrize("lengths", [(1,), (1, 4), (5, 1, 16)])
def test_mp4_holds_every_frame_at_exactly_its_time(tmp_path: Path, lengths: tuple[int, ...], fps: int) -> None:
    video = write(tmp_path, lengths, fps=fps).finish("{}")
    assert video == tmp_path / "video.mp4"
    found = packets(video)
    assert len(decode(video, 32, 32)) == len(found) == sum(lengths)
    assert {row["tick"] for row in found} == {f"1/{fps}"}
    assert [(int(row["dts"]), int(row["pts"]), int(row["duration"])) for row in found] == [
        (number, number, 1) for number in range(sum(lengths))
    ]
    assert describe(video)["fps"] == fps
    assert describe(video)["duration"] == sum(lengths) / fps


@pytest.mark.parametrize("size", [(2, 2), (16, 16), (18, 34), (64, 64), (64, 2), (96, 48)])
def test_any_even_size_and_single_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    video = write(tmp_path, (1, 1, 3), size=size, fps=120).finish("{}")
    assert video
    assert decode(video, *size).shape == (5, *size, 3)
    assert (describe(video)["height"], describe(video)["width"]) == size


def test_pictures_come_back_close_and_in_order(tmp_path: Path) -> None:
    video = write(tmp_path, (5, 12, 8), size=(64, 96)).finish("{}")
    assert video
    seen, drawn = decode(video, 64, 96).astype(int), moving_shapes(25, 64, 96).astype(int)
    errors = ((seen[:, None] - drawn[None]) ** 2).mean((2, 3, 4))
    assert (errors.argmin(axis=1) == np.arange(25)).all()
    assert errors.diagonal().max() < 40  # 32 dB; chroma is subsampled


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (12, 200, 90), (128, 128, 128)]
)
def test_flat_colours_are_right(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    writer = VideoWriter(tmp_path, width=64, height=32, fps=16)
    segment = writer.add_block(np.broadcast_to(np.array(colour, np.uint8), (2, 32, 64, 3)))
    video = writer.finish("{}")
    assert video
    for path in (segment.path, video):
        assert np.abs(decode(path, 32, 64).astype(int) - colour).max() <= 2
    with Image.open(thumbnail(video, tmp_path / "thumbnail.jpg")) as picture:
        assert np.abs(np.array(picture).astype(int) - colour).max() <= 6


def test_colours_are_tagged(tmp_path: Path) -> None:
    writer = write(tmp_path, (2,))
    video = writer.finish("{}")
    for path in (writer.segments[0].path, video):
        shown = subprocess.run(
            [ffmpeg_path(), "-hide_banner", "-i", str(path)], capture_output=True, text=True, check=False
        ).stderr
        assert "h264 (High)" in shown
        assert "yuv420p(tv, bt709, progressive)" in shown


def test_each_segment_plays_by_itself_and_follows_the_one_before(tmp_path: Path) -> None:
    lengths = (5, 1, 4, 16)
    writer = write(tmp_path, lengths, fps=7)
    first = 0
    for segment, length in zip(writer.segments, lengths, strict=True):
        assert segment == Segment(segment.path, first, length, length / 7)
        assert len(decode(segment.path, 32, 32)) == length
        found = packets(segment.path)
        assert found[0]["key"]
        assert all(row["dts"] == row["pts"] for row in found), "no B-frames"
        times = [int(row["pts"]) for row in found]
        assert times == pytest.approx([(first + number) * 90_000 / 7 for number in range(length)], abs=1)
        data = segment.path.read_bytes()
        assert len(data) % 188 == 0
        assert set(data[::188]) == {0x47}
        first += length
    assert [path.name for path in sorted(tmp_path.glob("block_*.ts"))] == [f"block_{n:04d}.ts" for n in range(4)]


def test_faststart(tmp_path: Path) -> None:
    video = write(tmp_path, (4,)).finish("{}")
    assert video
    data = video.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_resumed_run_gives_the_same_bytes(tmp_path: Path) -> None:
    lengths = (9, 4, 16)
    straight = write(tmp_path / "straight", lengths)
    video = straight.finish("settings")
    first = write(tmp_path / "resumed", lengths[:1])
    first.finish("settings of the part")
    second = VideoWriter(tmp_path / "resumed", width=32, height=32, fps=16, segments=first.segments)
    for length in lengths[1:]:
        second.add_block(moving_shapes(length, 32, 32, second.num_frames))
    again = second.finish("settings")
    assert video
    assert again
    assert again.read_bytes() == video.read_bytes()
    for mine, theirs in zip(second.segments, straight.segments, strict=True):
        assert mine.path.read_bytes() == theirs.path.read_bytes()
        assert mine.path.name == theirs.path.name


def test_resume_rejects_segments_with_a_gap(tmp_path: Path) -> None:
    segments = write(tmp_path, (4, 4, 4)).segments
    with pytest.raises(ValueError, match="first_frame=4"):
        VideoWriter(tmp_path, width=32, height=32, fps=16, segments=[segments[0], segments[2]])
    with pytest.raises(ValueError, match="block_0000"):
        VideoWriter(tmp_path / "elsewhere", width=32, height=32, fps=16, segments=segments)


def test_no_block_no_video(tmp_path: Path) -> None:
    assert VideoWriter(tmp_path / "a" / "b", width=32, height=32, fps=16).finish("{}") is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_nothing_but_the_results_is_left(tmp_path: Path) -> None:
    write(tmp_path, (1, 4)).finish("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block_0000.ts", "block_0001.ts", "video.mp4"]


def test_images_are_the_frames_themselves(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path, width=34, height=18, fps=16, export_images=True)
    drawn = np.random.default_rng(0).integers(0, 256, (4, 18, 34, 3), dtype=np.uint8)
    writer.add_block(drawn[:1])
    writer.add_block(drawn[1:])
    paths = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in paths] == [f"{n:06d}.png" for n in range(4)]
    for path, frame in zip(paths, drawn, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert (np.array(picture) == frame).all()


def test_frames_need_not_be_contiguous(tmp_path: Path) -> None:
    frames = np.asfortranarray(moving_shapes(4, 32, 32))
    writer = VideoWriter(tmp_path / "a", width=32, height=32, fps=16)
    straight = VideoWriter(tmp_path / "b", width=32, height=32, fps=16)
    assert writer.add_block(frames).path.read_bytes() == straight.add_block(moving_shapes(4, 32, 32)).path.read_bytes()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 34, 3), np.uint8),
        np.zeros((2, 32, 32, 4), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    writer = VideoWriter(tmp_path, width=32, height=32, fps=16)
    with pytest.raises(ValueError, match="uint8"):
        writer.add_block(frames)
    assert not writer.segments
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("width", "height", "fps"), [(31, 32, 16), (32, 31, 16), (0, 32, 16), (32, 32, 0)])
def test_wrong_sizes_are_refused(tmp_path: Path, width: int, height: int, fps: int) -> None:
    with pytest.raises(ValueError, match="="):
        VideoWriter(tmp_path, width=width, height=height, fps=fps)


@pytest.mark.parametrize("name", ["a b", "it's; $(touch x) & %d", "日本 é", "-y", "x" * 200, "concat:a|b"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    writer = write(tmp_path / name, (1, 4))
    video = writer.finish("{}")
    assert video
    assert describe(video)["num_frames"] == 5
    thumbnail(writer.segments[0].path, tmp_path / name / "thumbnail.jpg")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = write(Path("job"), (1, 4))
    assert writer.finish("{}") == Path("job/video.mp4")
    thumbnail(Path("job/block_0000.ts"), Path("job/thumbnail.jpg"))
    VideoWriter(tmp_path / "job", width=32, height=32, fps=16, segments=writer.segments)


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        VideoWriter(tmp_path / "job" / "inner", width=32, height=32, fps=16)
    with pytest.raises(OutputError, match="cannot be written"):
        VideoWriter(tmp_path / "job", width=32, height=32, fps=16)


def test_folder_that_disappears(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "job", width=32, height=32, fps=16)
    (tmp_path / "job").rmdir()
    with pytest.raises(OutputError, match=r"block_0000\.ts cannot be written: No such file"):
        writer.add_block(moving_shapes(4, 32, 32))
    assert not writer.segments


def test_full_disk_while_a_block_is_written(tmp_path: Path) -> None:
    writer = write(tmp_path, (4,))
    with largest_file(1000), pytest.raises(OutputError, match=r"block_0001\.ts cannot be written") as caught:
        writer.add_block(moving_shapes(16, 32, 32))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["block_0000.ts"]
    writer.add_block(moving_shapes(16, 32, 32, 4))  # room again: the run goes on
    video = writer.finish("{}")
    assert video
    assert describe(video)["num_frames"] == 20


def test_full_disk_while_joining_keeps_the_video_there_was(tmp_path: Path) -> None:
    writer = write(tmp_path, (16,), size=(64, 64))
    before = writer.finish("{}")
    assert before
    kept = before.read_bytes()
    writer.add_block(moving_shapes(16, 64, 64, 16))
    with largest_file(2000), pytest.raises(OutputError) as caught:
        writer.finish("{}")
    assert "\n" not in str(caught.value)
    assert before.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block_0000.ts", "block_0001.ts", "video.mp4"]


@pytest.mark.parametrize("has_checksum", [True, False])
@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "garbage"])
def test_damaged_segment_is_named_not_left_out(tmp_path: Path, damage: str, has_checksum: bool) -> None:
    writer = write(tmp_path, (4, 16, 4))
    if not has_checksum:  # told of by an older journal
        writer.segments = [replace(segment, checksum="") for segment in writer.segments]
    path = writer.segments[1].path
    data = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes({"emptied": b"", "cut": data[: 188 * 8], "garbage": bytes(len(data))}[damage])
    with pytest.raises(OutputError, match=r"block_0001\.ts has changed" if has_checksum else "joining the blocks"):
        writer.finish("{}")
    assert not (tmp_path / "video.mp4").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_of_a_segment_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = moving_shapes(8, 32, 32, 0)
    writer = VideoWriter(tmp_path, width=32, height=32, fps=16)
    data = bytearray(writer.add_block(frames).path.read_bytes())
    whole = bytes(data)
    data[len(data) // 2] ^= 4
    writer.segments[0].path.write_bytes(data)
    with pytest.raises(OutputError, match="has changed on the disk"):
        writer.finish("{}")
    again = VideoWriter(tmp_path, width=32, height=32, fps=16)
    assert again.adopt_block(frames) is None and "block_0000.ts is damaged" in caplog.text
    assert again.add_block(frames).path.read_bytes() == whole
    assert VideoWriter(tmp_path, width=32, height=32, fps=16).adopt_block(frames) is not None
    assert again.finish("{}") is not None


def test_stuck_ffmpeg_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = tmp_path / "ffmpeg"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(stuck))
    with pytest.raises(OutputError, match=r"took longer than 0 s"):
        run_ffmpeg([], what="encoding", data=bytes(10**6), timeout_s=0.2)


@pytest.mark.parametrize("script", ["#!/bin/sh\necho 'broken\nwords' >&2\nexit 3\n", "not a program"])
def test_failing_ffmpeg_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text(script)
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with pytest.raises(OutputError, match=r"encoding block_0000\.ts failed") as caught:
        write(tmp_path / "job", (16,), size=(64, 64))  # more than a pipe holds: must not hang
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "job").iterdir())


def test_thumbnail_is_small_and_never_enlarged(tmp_path: Path) -> None:
    writer = write(tmp_path, (2,), size=(240, 416))
    video = writer.finish("{}")
    assert video
    for path, width, size in ((video, 320, (320, 184)), (writer.segments[0].path, 1000, (416, 240))):
        with Image.open(thumbnail(path, tmp_path / "thumbnail.jpg", width)) as picture:
            assert (picture.format, picture.size) == ("JPEG", size)
    with pytest.raises(OutputError, match="thumbnail"):
        thumbnail(tmp_path / "missing.mp4", tmp_path / "none.jpg")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(OutputError, match="thumbnail"):
        thumbnail(tmp_path / "empty.mp4", tmp_path / "none.jpg")
    assert not (tmp_path / "none.jpg").exists()


def test_importing_the_writer_needs_no_torch() -> None:
    source = f"import sys; sys.path.insert(0, {str(Path(writer_module.__file__).parents[2])!r})\n"
    source += "import dualparal.media.writer, dualparal.media.metadata; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
