"""Files that cannot be looked at, named or written: one sentence and the right exit code in every command."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dualparal import Engine, GenerationRequest
from dualparal.cli import generate as cli
from dualparal.cli.main import main
from dualparal.errors import OutputError, RequestError
from dualparal.jobs.folder import JobFolder
from dualparal.media.metadata import describe
from dualparal.media.writer import VideoWriter
from dualparal.paths import expand, home_cache

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ["generate", "--prompt", "x", "--device", "cpu", "--height", "32", "--width", "32", "--latents_num", "5"]
COMMANDS = {
    "outputs": [*GENERATE, "--outputs", "PATH"],
    "save_file": [*GENERATE, "--save_file", "PATH"],
    "lora": [*GENERATE, "--lora", "PATH"],
    "model": [*GENERATE, "--model_id", "PATH"],
    "presets of generate": [*GENERATE, "--presets_folder", "PATH"],
    "plan": ["plan", "--model_id", "PATH"],
    "presets of plan": ["plan", "--preset", "pocket", "--presets", "PATH"],
    "presets": ["presets", "--presets_folder", "PATH"],
    "resume": ["resume", "last", "--outputs", "PATH"],
    "delete": ["jobs", "--outputs", "PATH", "--delete", "last"],
    "info": ["info", "PATH"],
    "tiny": ["tiny", "PATH"],
    "bench": ["bench", "quality", "--prompts", "0", "--out", "PATH"],
    "serve": ["serve", "--device", "cpu", "--outputs", "PATH"],
    "model of serve": ["serve", "--device", "cpu", "--model_id", "PATH"],
    "presets of serve": ["serve", "--device", "cpu", "--presets", "PATH"],
}


BAD = {
    "no such home": "~nobody_here/x", "a long name": "x" * 300, "a long path": "/tmp/" + "y/" * 3000, "empty": "",
    "below a file": "file/x", "a loop": "loop/x",
}  # fmt: skip


def says(command: list[str], path: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, the one line told) of a command that must not get to any work."""
    try:
        code = main([path if word == "PATH" else word for word in command])
    except SystemExit as end:  # argparse's, after the usage
        code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.err.splitlines()[-1]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, (printed.out, printed.err)
    return code, printed.err


@pytest.mark.parametrize("bad", BAD)
def test_one_sentence(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    for name, command in COMMANDS.items():
        with without_logs():
            code, printed = says(command, BAD[bad], capsys)
        assert code in (1, 2) and ("rror" in printed or "ERROR" in printed), (name, printed)
        assert "None" not in printed and "Errno" not in printed, (name, printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Serving sets up logs for good."""
    before, streams = logging.getLogger().handlers[:], (sys.stdout, sys.stderr)
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    logging.getLogger().handlers.clear()
    try:
        yield
    finally:
        logging.getLogger().handlers[:] = before
        logging.captureWarnings(False)
        (sys.stdout, sys.stderr), (sys.excepthook, threading.excepthook, sys.unraisablehook) = streams, hooks


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_files_and_no_home(tmp_path: Path) -> None:
    """As a user that the machine does not know, without HOME."""
    for name in ("locked", "locked/model", "locked/presets"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "closed").mkdir(mode=0o711)
    for folder in (tmp_path, *tmp_path.parents, *ROOT.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    named = [command for name, command in COMMANDS.items() if name != "tiny"]  # which loads torch
    commands = [[str(tmp_path / "locked/x") if word == "PATH" else word for word in command] for command in named]
    commands += [["jobs", "--outputs", str(tmp_path / "closed")], ["presets", "--presets", str(tmp_path / "closed")]]
    commands += [["plan", "--preset", "pocket"], ["jobs", "--outputs", str(tmp_path / "open")]]
    script = "import sys, json; from tests.cli.test_paths import run_all; run_all(json.loads(sys.argv[1]))"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "DUALPARAL_CACHE", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], cwd=tmp_path / "open",
        env={**environment, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "open")}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(commands)
    for command, (code, printed) in zip(commands[:-2], results, strict=False):
        assert code in (1, 2) and printed and "Traceback" not in printed, (command, code, printed)
    assert [code for code, _ in results[-2:]] == [0, 0], results[-2:]


def run_all(commands: list[list[str]]) -> None:
    """As another user: each command's exit code and last line of standard error, as JSON."""
    for module in ("ui.serve", "bench.main", "engine.engine", "model.hub", "media.metadata"):  # which that user may not read
        importlib.import_module(f"dualparal.{module}")
    with contextlib.suppress(Exception):
        main(["generate", "--prompt", "x", "--model_id", "/"])
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), without_logs():
            try:
                code = main(command)
            except SystemExit as end:
                code = int(end.code or 0)
        print(json.dumps([code, (err.getvalue().splitlines() or [""])[-1]]), flush=True)


def test_where_things_are_kept_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    kept = home_cache()
    assert kept == home_cache() == tmp_path / f"dualparal-{os.getuid()}" and kept.stat().st_mode & 0o777 == 0o700
    kept.chmod(0o755)  # whoever may have written there
    assert home_cache() != kept


def test_where_a_video_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    inside = {"videos": "videos", ".": ".", "new/": "new", "videos/../": ".", str(tmp_path): "."}
    for wanted, folder in inside.items():
        assert cli.target_of(wanted, "abcdef") == (tmp_path / folder / "abcdef.mp4").resolve()
    assert cli.target_of("/", "abcdef") == Path("/abcdef.mp4")
    odd = [" a b ", "狐.mp4", "it's \"#%?&.mp4", "a\nb.mp4", "-x", "x" * 255, os.fsdecode(b"\xff.mp4"), "none:0.5"]
    for name in odd:
        assert cli.target_of(name, "abcdef") == tmp_path / name
        cli.copy_to(Path(__file__), tmp_path / name)
        assert (tmp_path / name).read_bytes() == Path(__file__).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for wrong in ("/dev/null", "pipe", "x" * 256):
        with pytest.raises(OutputError, match="name another --save_file"):
            cli.target_of(wrong, "abcdef")
    assert {path.name for path in tmp_path.iterdir()} == {*odd, "videos", "new", "pipe"}


@pytest.mark.parametrize("name", ["a b", "狐", "it's #%", "a\nb", "-x", "x" * 200, os.fsdecode(b"\xff"), "low", "a:0.5"])
def test_odd_names(name: str, tiny: Path, tmp_path: Path) -> None:
    """Of a model, a LoRA and an outputs folder: what is found, what a job's record tells, and what the mp4 does."""
    outputs, model, lora = (tmp_path / what / name for what in ("outputs", "models", "loras"))
    for path in (model, lora):
        path.parent.mkdir()
    model.symlink_to(tiny)
    lora.mkdir()
    save_file(
        {f"blocks.0.attn1.to_q.lora_{part}.weight": torch.zeros(shape) for part, shape in (("A", (1, 24)), ("B", (24, 1)))},
        lora / "x.safetensors",
    )
    engine = Engine(str(model), outputs=outputs, device="cpu", threads=1, loras=[f"{lora}:0.5"])
    assert engine.checkpoint.folder == model
    settings = engine.resolve(GenerationRequest(prompt="x", latents_num=5, height=32, width=32))
    folder = JobFolder.create(engine.outputs, "abcdef", settings, **engine._setup.made_with())
    assert folder.record()["model"] == str(model) and folder.record()["loras"] == [f"{lora}/x.safetensors:0.5"]
    assert folder.request() == settings
    writer = VideoWriter(folder.path, width=32, height=32, fps=16)
    writer.add_block(np.zeros((5, 32, 32, 3), np.uint8))
    assert json.loads(describe(writer.finish(settings.to_json()))["settings"])["model"] == settings.model  # type: ignore[arg-type]


def test_a_path_of_no_machine() -> None:
    for wrong in ("", "a\0b", "~nobody_here", "~nobody_here/x"):
        with pytest.raises(RequestError, match="path"):
            expand(wrong)
