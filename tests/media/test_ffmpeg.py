"""An ffmpeg that cannot write videos is told before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualparal import Engine
from dualparal.errors import OutputError
from dualparal.media.ffmpeg import check_ffmpeg

BAD = {
    "missing": (None, 0o755, "cannot be started .No such file"),
    "not executable": ("#!/bin/sh\n", 0o644, "cannot be started .Permission denied"),
    "no program": ("hello", 0o755, "cannot be started .Exec format error"),
    "it fails": ("#!/bin/sh\nexit 3\n", 0o755, "ended with 3"),
    "without libx264": ("#!/bin/sh\necho ' V..... libvpx   VP8'\n", 0o755, "built without libx264"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_told_before_any_work(name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, mode, says = BAD[name]
    binary = tmp_path / "ffmpeg"
    if text is not None:
        binary.write_text(text)
        binary.chmod(mode)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(binary))
    with pytest.raises(OutputError, match=says) as caught:
        Engine(tiny, device="cpu", outputs=tmp_path / "outputs")
    assert "\n" not in str(caught.value) and str(binary) in str(caught.value) and "IMAGEIO_FFMPEG_EXE" in str(caught.value)
    assert not (tmp_path / "outputs").exists()


def test_the_one_that_is_installed_will_do() -> None:
    check_ffmpeg()
