"""Standard streams closed, full, read by nobody or not UTF-8: what is printed is readable, and exit codes are right."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualparal.jobs.folder import JobFolder
from dualparal.presets import Preset, complete
from dualparal.request import GenerationRequest
from dualparal.streams import ERRORS, Lossy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs with a long prompt in two scripts."""
    folder = tmp_path_factory.mktemp("outputs")
    settings = complete(GenerationRequest(prompt="a fox · 狐 " * 10), Preset())
    for number in range(20):
        JobFolder.create(folder, f"aaaa{number:02}", settings)
    return folder


def run(shell: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`shell` with `PROGRAM` as our program; sh, so that streams are as people make them."""
    program = f"{sys.executable} -W error -m dualparal"
    return subprocess.run(
        ["bash", "-c", shell.replace("PROGRAM", program)], capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("environment", ASCII, ids=["PYTHONIOENCODING", "LC_ALL"])
def test_ascii(outputs: Path, environment: dict[str, str]) -> None:
    done = run(f"PROGRAM jobs --outputs {outputs} --limit 1 && PROGRAM presets && PROGRAM plan --preset pocket", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    assert "a fox - \\u72d0 a fox - \\u72d0" in text and "..." in text


@pytest.mark.parametrize("command", ["jobs --outputs OUTPUTS", "presets", "generate --help"])
def test_a_reader_that_has_had_enough(outputs: Path, command: str) -> None:
    done = run(f"set -o pipefail; PROGRAM {command.replace('OUTPUTS', str(outputs))} | true")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(("out", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
def test_an_answer_that_is_lost(outputs: Path, out: str, why: str) -> None:
    done = run(f"PROGRAM jobs --outputs {outputs} {out}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"error: standard output cannot be written: {why}\n"


@pytest.mark.parametrize("err", ["2>&-", "2>/dev/full", "2> >(exec true)", "0>&- 2>&-"])
def test_nobody_hears_what_is_wrong(outputs: Path, err: str) -> None:
    done = run(
        f"PROGRAM jobs --outputs {outputs} --state failed {err}; echo $?; PROGRAM jobs --outputs {outputs} {err} | wc -l"
    )
    assert done.stdout.split() == [b"0", b"20"]
    wrong = run(f"PROGRAM generate --prompt x --height 33 {err}; echo $?; PROGRAM jobs --no_such_flag {err}; echo $?")
    assert wrong.stdout.split() == [b"2", b"2"]


def test_characters_that_are_no_characters() -> None:
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, "utf-8", ERRORS)
    stream.write("a\udcff…")
    stream.flush()
    assert held.getvalue() == b"a\\udcff\xe2\x80\xa6"


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    reader = subprocess.Popen(["wc", "-c"], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    with io.BufferedWriter(Lossy(writing)) as stream:
        stream.write(b"x" * 1_000_000)
    os.close(writing)
    out, _ = reader.communicate(timeout=60)
    assert int(out) == 1_000_000
