"""`python -m dualparal` with the real engine: from the flags to the mp4, Ctrl-C and resume, and the exit codes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dualparal.cli.main import main
from dualparal.media.metadata import read_settings
from tests.conftest import wait_until
from tests.distributed.test_engine import count_frames, hears_control_c

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 600
SIZE = ["--height", "32", "--width", "32", "--num_per_block", "3", "--num_cat", "2", "--threads", "1", "--device", "cpu"]
pytestmark = pytest.mark.timeout(1800)


@contextlib.contextmanager
def dualparal(folder: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The program at work in `folder`, on a terminal of its own as far as signals go; its output comes through pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DUALPARAL_OUTPUTS", None)
    with hears_control_c():
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "dualparal", *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def first_line(process: subprocess.Popen[str]) -> str:
    """The id of the job, told while the program still has everything to do."""
    assert process.stdout is not None
    word, _, job_id = process.stdout.readline().rstrip("\n").partition(" ")
    assert word == "job" and job_id and process.poll() is None
    return job_id


def test_generate(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], leaves_nothing: None) -> None:
    video = tmp_path / "videos" / "x.mp4"
    request = ["--prompt", "a red circle", "--latents_num", "12", "--sample_steps", "4", "--seed", "7", *SIZE]
    files = ["--save_file", video, "--export_image", "--look", tmp_path / "looks" / "x.webp"]
    with dualparal(tmp_path, "generate", "--model_id", tiny, "--ranks", "2", *request, *files) as process:
        job_id = first_line(process)
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert out.startswith(f"{video}: 45 frames, seed 7; ") and out.count("\n") == 1
    folder = tmp_path / "outputs" / job_id
    assert count_frames(video) == count_frames(folder / "video.mp4") == 45
    assert len(list((folder / "frames").glob("*.png"))) == 45
    with Image.open(tmp_path / "looks" / "x.webp") as look:
        assert look.format == "WEBP" and getattr(look, "n_frames", 1) == 12
    # The bar is no terminal's: nothing but text and returns, and it comes to its end.
    assert "100%" in err and "16/16 steps" in err
    assert "Traceback" not in err and "\x1b" not in err and err.endswith("\n")
    assert main(["info", str(video)]) == 0
    printed = capsys.readouterr().out
    assert "a red circle" in printed and "45 frames" in printed
    settings = read_settings(video)
    assert (settings.latents_num, settings.num_inference_steps, settings.seed) == (12, 4, 7)


@pytest.mark.parametrize("streams", ["2>/dev/full | true", ">/dev/full 2> >(exec true)", ">&- 2>&- <&-"])
def test_no_stream_ends_a_job(tiny: Path, tmp_path: Path, streams: str, leaves_nothing: None) -> None:
    program = f"{sys.executable} -W error -m dualparal generate --model_id {tiny} --ranks 2 --verbose"
    request = ["--prompt", "x", "--latents_num", "5", "--sample_steps", "2", *SIZE, "--save_file", "x.mp4"]
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} {' '.join(request)} {streams}"], cwd=tmp_path, timeout=WAIT_S, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert count_frames(tmp_path / "x.mp4") == 17


def test_control_c_keeps_the_finished_blocks_and_resume_goes_on(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    request = ["--prompt", "long", "--latents_num", "60", "--sample_steps", "20", "--schedule", "preview", *SIZE]
    with dualparal(tmp_path, "generate", "--model_id", tiny, "--ranks", "2", *request) as process:
        job_id = first_line(process)
        folder = tmp_path / "outputs" / job_id
        assert wait_until(lambda: any(folder.glob("block_*.ts")) or process.poll() is not None, WAIT_S)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the workers as well
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    assert not out and "Traceback" not in err
    part = folder / "video.mp4"
    assert f"finished part: {part}" in err.splitlines()[-1]
    assert 17 <= count_frames(part) < 237
    video = tmp_path / "whole.mp4"
    with dualparal(tmp_path, "resume", "last", "--ranks", "2", "--device", "cpu", "--save_file", video) as process:
        assert first_line(process) == job_id
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert out.startswith(f"{video}: 237 frames")
    assert count_frames(video) == count_frames(part) == 237


def test_another_program_stops_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], leaves_nothing: None) -> None:
    request = ["--prompt", "long", "--latents_num", "60", "--sample_steps", "50", *SIZE]
    with dualparal(tmp_path, "generate", "--model_id", tiny, *request) as process:
        job_id = first_line(process)
        folder = tmp_path / "outputs" / job_id
        assert wait_until(lambda: any(folder.glob("block_*.ts")) or process.poll() is not None, WAIT_S)
        assert main(["jobs", "--outputs", str(tmp_path / "outputs"), "--delete", job_id]) == 2
        assert main(["jobs", "--outputs", str(tmp_path / "outputs"), "--cancel", "last", "--delete", job_id]) == 0
        _, err = process.communicate(timeout=WAIT_S)
    printed = capsys.readouterr()
    assert process.returncode == 130 and "Traceback" not in err
    assert f"job {job_id} was stopped after" in printed.out and "stop it first" in printed.err
    assert not folder.exists()


def test_a_checkpoint_that_lacks_a_tensor_is_one_sentence_before_any_job(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with dualparal(tmp_path, "generate", "--model_id", model, "--prompt", "x", "--latents_num", "5", *SIZE) as process:
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (1, ""), err
    assert err.startswith("error: ") and "decoder.conv_out.bias" in err and err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_killed_worker_is_one_sentence_and_exit_code_1(tiny: Path, tmp_path: Path, leaves_nothing: None) -> None:
    request = ["--prompt", "long", "--latents_num", "60", "--sample_steps", "20", "--schedule", "preview", *SIZE]
    with dualparal(tmp_path, "generate", "--model_id", tiny, *request) as process:
        folder = tmp_path / "outputs" / first_line(process)
        assert wait_until(lambda: any(folder.glob("block_*.ts")) or process.poll() is not None, WAIT_S)
        for worker in psutil.Process(process.pid).children():
            if "spawn_main" in " ".join(worker.cmdline()):
                worker.kill()
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (1, ""), err
    assert err.splitlines()[-1].startswith("error: ") and "was killed by SIGKILL" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--latents_num", "12"], "--prompt"),
        (["--prompt", "x", "--no_such_flag"], "--no_such_flag"),
        (["--prompt", "x", "--latents_num", "12", "--num_per_block", "2", "--num_cat", "3"], "num_cat"),
        (["--prompt", "x", "--height", "33"], "height"),
    ],
)
def test_wrong_usage(tiny: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["generate", "--model_id", str(tiny), "--device", "cpu", *arguments])
    except SystemExit as end:  # argparse's
        code = end.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out
    assert says in printed.err and "Traceback" not in printed.err
