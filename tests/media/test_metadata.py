"""Settings survive the mp4 word for word, and no stranger's file gets further than one sentence."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualparal.errors import RequestError
from dualparal.media.metadata import MAX_SETTINGS_BYTES, describe, format_info, read_settings
from dualparal.media.writer import VideoWriter
from dualparal.request import MAX_PROMPT_CHARS, GenerationRequest
from tests import settings as some

FRAMES = np.zeros((3, 32, 48, 3), np.uint8)


def make_video(folder: Path, text: str) -> Path:
    writer = VideoWriter(folder, width=48, height=32, fps=16)
    writer.add_block(FRAMES)
    video = writer.finish(text)
    assert video
    return video


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a video made here."""
    return make_video(tmp_path_factory.mktemp("genuine"), GenerationRequest(prompt="a fox", seed=7).to_json()).read_bytes()


def one_sentence(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        read_settings(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


AWKWARD = "=;#\\'\"\n\t\r[chapter]\nTITLE=x %s $(id) `id` </script> é 日本語 🦊 \u2028 \x85 ;FFMETADATA1\n#"


def test_settings_say_which_model_made_them(tmp_path: Path) -> None:
    made_with = some.settings(prompt="a fox", latents_num=5).model_copy(update={"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"})
    video = make_video(tmp_path, made_with.to_json())
    assert read_settings(video) == made_with.as_request(), "asked for again, by whatever model"
    lines = format_info(video).splitlines()
    assert "model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in lines and "left_context: latest" in lines


@pytest.mark.parametrize(
    "prompt", [AWKWARD, "\\", "\\\\\\", "=", "ends with backslash\\", "🦊" * MAX_PROMPT_CHARS, "x" + "\n" * 50]
)
def test_settings_round_trip(tmp_path: Path, prompt: str) -> None:
    request = GenerationRequest(prompt=prompt, negative_prompt=prompt, seed=2**63 - 1, guidance_scale=3.3, latents_num=5)
    assert read_settings(make_video(tmp_path, request.to_json())) == request


@settings(deadline=None, max_examples=25)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=300))
@example(text="ends with a backslash\\")
def test_any_text_round_trips(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        video = make_video(Path(folder), text)
        assert describe(video)["settings"] == (text or None)


def test_describe_and_info(tmp_path: Path) -> None:
    video = make_video(tmp_path, GenerationRequest(prompt="a fox\nat night", seed=7).to_json())
    found = describe(str(video))
    assert json.loads(found.pop("settings")) == {"prompt": "a fox\nat night", "seed": 7}
    assert found == {"num_frames": 3, "fps": 16.0, "width": 48, "height": 32, "duration": 3 / 16}
    assert format_info(video).splitlines()[0] == "48 x 32, 3 frames at 16 fps, 0.19 s"
    assert "seed: 7" in format_info(video)


def test_video_without_settings(tmp_path: Path) -> None:
    assert "holds no settings" in one_sentence(make_video(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "prompt is missing"),
        ('{"prompt": null}', "prompt"),
        ('{"prompt": "x", "seed": NaN}', "seed"),
        ('{"prompt": "x", "height": 1e999}', "height"),
        ('{"prompt": "x", "self": 1}', "self is not a field"),
        ('{"prompt": "x", "rm -rf": 1}', "'rm -rf' is not a field"),
        ('{"prompt": "x", "%s": 1}' % ("k" * 50_000), "is not a field"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "x", "seed": %s}' % ("9" * 5000), "not JSON"),
        ('{"prompt": "%s"}' % ("x" * 5000), "5000 characters"),
    ],
)
def test_hostile_settings(tmp_path: Path, text: str, words: str) -> None:
    assert words in one_sentence(make_video(tmp_path, text))


def test_settings_too_long_to_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path, "x" * MAX_SETTINGS_BYTES)
    assert "not JSON" in one_sentence(video)
    monkeypatch.setattr("dualparal.media.metadata.MAX_SETTINGS_BYTES", MAX_SETTINGS_BYTES - 1)
    assert "is longer than" in one_sentence(video)
    for text in ("x" * (MAX_SETTINGS_BYTES + 1), "nul\0"):
        with pytest.raises(ValueError, match="settings must be"):
            make_video(tmp_path, text)


def test_files_that_are_no_videos(tmp_path: Path, genuine: bytes) -> None:
    cases = {
        "empty.mp4": (b"", "it is empty"),
        "short.mp4": (b"\0\0\0", "it is cut off"),
        "text.txt": (b"#EXTM3U\nfile:///etc/passwd\n" * 100, "it is not an mp4"),
        "zeros.mp4": (bytes(10_000), "it is not an mp4"),
        "segment.ts": (b"\x47" + bytes(187), "it is not an mp4"),
        "cut.mp4": (genuine[:200], "it is cut off"),
        "headonly.mp4": (genuine[: struct.unpack(">I", genuine[:4])[0]], "it has no index"),
        "audio.mp4": (genuine.replace(b"vide", b"soun", 1), "not a video"),
        "no-track.mp4": (genuine.replace(b"trak", b"free", 1), "no video track"),
        "binary.mp4": (genuine.replace(b"a fox", b"\xff\xfe\xff\xfe\xff"), "damaged"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        text = one_sentence(path)
        assert words in text, (name, text)
        assert name in text
        assert "made by this program" in text


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "missing.mp4", tmp_path / "pipe.mp4", Path("/dev/zero"), tmp_path / "nul\0.mp4"):
        assert "is not a file" in one_sentence(path)


def test_name_of_the_file_cannot_break_the_sentence(tmp_path: Path) -> None:
    path = tmp_path / ("line\nbreak\x1b[31m" + "x" * 200)
    path.write_bytes(b"nonsense")
    assert "\x1b" not in one_sentence(path)


def test_huge_file_costs_nothing(tmp_path: Path, genuine: bytes) -> None:
    sparse = tmp_path / "huge.mp4"
    with sparse.open("wb") as file:
        file.write(struct.pack(">I4sI4sI", 20, b"ftyp", 0, b"isom", 0) + struct.pack(">I4sQ", 1, b"mdat", 2**40))
        file.truncate(2**40 + 20)
        file.seek(2**40 + 20)
        file.write(genuine[genuine.index(b"moov") - 4 :])
    assert read_settings(sparse).prompt == "a fox"
    with sparse.open("r+b") as file:
        file.seek(20)
        file.write(struct.pack(">I4sQ", 1, b"moov", 2**40))
    assert "is larger than" in one_sentence(sparse)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, genuine: bytes) -> None:
    path, dice = tmp_path / "flipped.mp4", random.Random(0)
    for _ in range(1500):
        data = bytearray(genuine)
        for _ in range(dice.randint(1, 6)):
            data[dice.randrange(len(data))] = dice.choice((0, 1, 8, 127, 255, dice.randrange(256)))
        path.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        try:
            read_settings(path)
        except RequestError as error:
            assert "\n" not in str(error)
