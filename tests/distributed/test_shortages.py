"""A real engine on a host that lacks something: shared memory that is full or cannot be written, no file that can be opened, a
folder whose name is not UTF-8. Jobs end with a reason, nothing waits for ever, and signals end the program.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 300
BEGIN = """
import json, os, resource, signal, sys, time
from pathlib import Path
from dualparal import DualParalError, Engine, GenerationRequest, WorkerDied
from dualparal.engine import replica
from dualparal.presets import Preset
replica.PAUSE_AFTER_FAILED_START_S = replica.MAX_PAUSE_S = 0.05
SMALL = Preset(height=32, width=32, num_per_block=3, num_cat=1, num_inference_steps=4)
REQUEST = GenerationRequest(prompt="a fox", latents_num=6, seed=1)
OPTIONS = dict(preset=SMALL, device="cpu", threads=1, ranks=2)
def main(folder, outputs):
"""
NO_SPACE = "mount -t tmpfs -o nr_inodes=1 tmpfs /dev/shm"
READ_ONLY = "mount -t tmpfs -o ro tmpfs /dev/shm"


def can_mount() -> bool:
    if os.getuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "sh", "-c", READ_ONLY], check=False, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="a mount namespace of one's own is for root")


def run(script: str, *arguments: bytes | str | Path, mount: str = "") -> str:
    """What `script`, the body of a function of (folder, outputs), prints in a process of its own."""
    text = BEGIN + textwrap.indent(textwrap.dedent(script), "    ") + "\nmain(*map(Path, sys.argv[1:]))\n"
    command: list[bytes | str | Path] = [sys.executable, "-c", text, *arguments]
    if mount:
        command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode(errors="replace")


@needs_mounts
@pytest.mark.parametrize(("mount", "reason"), [(NO_SPACE, "No space left on device"), (READ_ONLY, "Read-only file system")])
def test_jobs_without_shared_memory_fail_with_the_reason(tiny: Path, tmp_path: Path, mount: str, reason: str) -> None:
    reported = run(
        """
        engine = Engine(folder, outputs=outputs, **OPTIONS).start(wait=False)
        try:
            engine.submit(REQUEST).result(200)
        except DualParalError as error:
            print("told:", error, "state:", engine.state, "stuck:", engine.stuck)
        engine.close()
        """,
        tiny, tmp_path / "outputs", mount=mount,
    )  # fmt: skip
    assert reason in reported and "state: failed" in reported and "stuck: None" in reported


@needs_mounts
def test_shared_memory_that_comes_back(tiny: Path, tmp_path: Path) -> None:
    reported = run(
        """
        import subprocess
        replica.PAUSE_AFTER_FAILED_START_S = replica.MAX_PAUSE_S = 1.0
        engine = Engine(folder, outputs=outputs, **OPTIONS).start(wait=False)
        job = engine.submit(REQUEST)
        while engine.state != "restarting":
            time.sleep(0.05)
        subprocess.run(["mount", "-o", "remount,rw", "/dev/shm"], check=True)
        print("frames:", job.result(200).num_frames)
        engine.close()
        """,
        tiny, tmp_path / "outputs", mount=READ_ONLY,
    )  # fmt: skip
    assert "frames: 21" in reported


@needs_mounts
@pytest.mark.parametrize("mount", [NO_SPACE, READ_ONLY])
def test_a_signal_ends_a_server_without_shared_memory(tiny: Path, tmp_path: Path, mount: str) -> None:
    serve = [sys.executable, "-m", "dualparal", "serve", "--model_id", str(tiny), "--device", "cpu", "--log_json"]
    log = tmp_path / "log"
    with log.open("wb") as lines:
        server = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *serve], cwd=ROOT, stdout=lines, stderr=lines,
            env=os.environ | {"DUALPARAL_OUTPUTS": str(tmp_path / "outputs")},
        )  # fmt: skip
        try:
            assert wait_until(lambda: b"workers ended" in log.read_bytes() or server.poll() is not None, WAIT_S)
            server.send_signal(signal.SIGTERM)
            assert server.wait(WAIT_S) == 0, log.read_text()[-2000:]
        finally:
            server.kill()
            server.wait()
    assert all(isinstance(json.loads(line), dict) for line in log.read_text().splitlines())


def test_a_signal_ends_a_program_that_can_open_no_file(tiny: Path, tmp_path: Path) -> None:
    reported = run(
        """
        import threading
        engine = Engine(folder, outputs=outputs, **OPTIONS)
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        below = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]
        engine.start()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))
        os.kill(int(engine.workers["codec"]["pid"]), signal.SIGKILL)
        while engine.state != "restarting":
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(60)
        engine.close()
        print("closed:", engine.state)
        """,
        tiny, tmp_path / "outputs",
    )  # fmt: skip
    assert "closed: closed" in reported


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_rank_killed_while_no_file_can_be_opened(tiny: Path, tmp_path: Path, comes_back: bool) -> None:
    """Its job ends with the reason. The workers come back once files can be opened; where that never happens, starts are tried
    and given up, with the reason."""
    told = run(
        f"""
        comes_back = {comes_back}
        replica.PAUSE_AFTER_FAILED_START_S = replica.MAX_PAUSE_S = 1.0 if comes_back else 0.05
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        def limit(number):
            resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (number, hard))
        # They stay open: below the limit no number is free, but poll works.
        below = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]

        engine = Engine(folder, outputs=outputs, **OPTIONS).start()
        at_work = engine.submit(REQUEST.model_copy(update={{"latents_num": 600}}))
        while at_work.state != "running":
            time.sleep(0.05)
        limit(32)
        os.kill(int(engine.workers["rank 1"]["pid"]), signal.SIGKILL)
        while engine.state not in ("restarting", "failed"):
            time.sleep(0.05)
        try:
            at_work.result(200)
        except DualParalError as error:
            print("at work:", error)
        if comes_back:
            while not (engine.error and "Too many open files" in str(engine.error)):
                time.sleep(0.05)
            limit(soft)
            print("frames:", engine.submit(REQUEST).result(200).num_frames)
        else:
            while engine.state != "failed":
                time.sleep(0.05)
        print("state:", engine.state, "reason:", engine.error, "stuck:", engine.stuck)
        limit(soft)
        engine.close()
        print("record:", at_work.folder.final_event())
        """,
        tiny, tmp_path / "outputs",
    )  # fmt: skip
    assert "at work: rank 1 was killed by SIGKILL" in told and "kind='WorkerDied', message='rank 1 was killed" in told
    reason = "the supervisor failed: OSError: [Errno 24] Too many open files"
    assert f"{'state: ready reason: None' if comes_back else f'state: failed reason: {reason}'} stuck: None" in told
    assert ("frames: 21" in told) is comes_back


def test_an_outputs_folder_that_is_not_utf_8(tiny: Path, tmp_path: Path) -> None:
    outputs = os.fsencode(tmp_path) + b"/caf\xe9"
    reported = run(
        """
        with Engine(folder, outputs=outputs, **OPTIONS) as engine:
            job = engine.submit(REQUEST)
            result = job.result(200)
            print("frames:", result.num_frames, Path(result.path).stat().st_size > 1000, job.folder.events()[-1].num_frames)
        """,
        tiny, outputs,
    )  # fmt: skip
    assert "frames: 21 True 21" in reported
    listed = subprocess.run(
        [sys.executable, "-m", "dualparal", "jobs", "--outputs", outputs],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=WAIT_S,
    )
    assert b"finished" in listed.stdout
