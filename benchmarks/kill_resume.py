"""kill -9 of everything, front end and workers, at random moments; the next start must go on and give the same bits.

A child process serves a folder of jobs with `Engine.recover()`; this program kills its whole process group again and again. At
the end segments and mp4 must equal those of a run that was left alone. Exit code 1 when they do not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.events import FINAL, Finished, Interrupted
from dualparal.runtime import recovery
from dualparal.runtime.journal import JobFolder, list_jobs
from dualparal.runtime.state import read_state

START_S = 600.0
KILLS_PER_JOB = 4


def request(seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt="killed again and again", seed=seed, latents_num=48, num_per_block=4, num_cat=2, num_inference_steps=24,
        height=32, width=32,
    )  # fmt: skip


def engine_on(outputs: Path, ranks: int) -> Engine:
    return Engine(checkpoint("tiny"), ranks=ranks, device="cpu", threads=1, outputs=outputs)


def child(outputs: Path, ranks: int) -> None:
    """Serve what is there until all of it has ended."""
    recovery.MAX_INTERRUPTIONS = 10**6  # a job here is killed more often than one that kills the program would be let
    engine = engine_on(outputs, ranks)
    jobs = engine.recover()
    with engine:
        for job in jobs:
            job.result()


def start(outputs: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--child", str(outputs), "--ranks", str(ranks)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def progress(job: JobFolder) -> tuple[int, int]:
    """(next item of the saved sweep, finished blocks) of a job on disk."""
    try:
        state, _ = read_state(job.path / "state")
    except OSError:
        return 0, 0
    return (state.next_index, state.num_finished) if state else (0, 0)


def kill_once(outputs: Path, ranks: int, dice: random.Random, job: JobFolder) -> tuple[int, int] | None:
    """Start the child, kill it at a random moment after it has gone on with `job`; what was saved, None if too late."""
    process = start(outputs, ranks)
    file = job.path / "state" / "sweep.safetensors"
    before, deadline_s = _stamp(file), time.monotonic() + START_S
    while _stamp(file) == before and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    time.sleep(dice.random() * 4)
    is_too_late = process.poll() is not None
    if not is_too_late:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None if is_too_late or job.final_event() is not None else progress(job)


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def survivors(outputs: Path) -> list[str]:
    """Processes that still know the outputs folder a second after the kill."""
    time.sleep(1.0)
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_other = entry.name.isdigit() and int(entry.name) != os.getpid()
            if is_other and str(outputs).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.ranks)
        return 0
    print(hardware(), flush=True)
    dice = random.Random(options.seed)
    num_jobs = -(-options.kills // KILLS_PER_JOB)
    faults, moments = [], []
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        started_s = time.monotonic()
        with engine_on(calm, options.ranks) as engine:
            for seed in range(num_jobs):
                engine.submit(request(seed), job_id=f"{seed:06x}").result()
        calm_s = time.monotonic() - started_s
        template = engine.checkpoint.folder
        for job in reversed(list(list_jobs(calm))):
            about = {key: value for key, value in job.record().items() if key not in ("request", "job_id", "created_s")}
            assert about["model"] == str(template)
            JobFolder.create(killed, job.job_id, job.request(), **about)
        for job in reversed(list(list_jobs(killed))):
            for _ in range(min(KILLS_PER_JOB, options.kills - len(moments))):
                saved = kill_once(killed, options.ranks, dice, job)
                if saved is None:
                    break
                moments.append((job.job_id, *saved))
                faults += [f"process {pid} survived" for pid in survivors(killed)]
                print(f"kill {len(moments)}: job {job.job_id}, saved up to item {saved[0]}, {saved[1]} blocks", flush=True)
        last = start(killed, options.ranks)
        last.wait()
        num_interrupted = 0
        for job in list_jobs(killed):
            events, twin = job.events(), JobFolder(calm / job.job_id)
            num_interrupted += sum(isinstance(event, Interrupted) for event in events)
            finals = [event for event in events if isinstance(event, FINAL)]
            if len(finals) != 1 or not isinstance(finals[0], Finished):
                faults.append(f"{job.job_id} ended with {finals}")
                continue
            if [path.read_bytes() for path in job.segments()] != [path.read_bytes() for path in twin.segments()]:
                faults.append(f"{job.job_id}: segments differ")
            if job.video.read_bytes() != twin.video.read_bytes():
                faults.append(f"{job.job_id}: video.mp4 differs")
    rows = [["jobs", num_jobs], ["kills of everything in mid-job", len(moments)],
            ["different saved sweeps", len(set(moments))], ["interruptions in the journals", num_interrupted],
            ["seconds of the calm run", f"{calm_s:.0f}"], ["faults", len(faults)]]  # fmt: skip
    print(table(["what", "count"], rows))
    for fault in faults:
        print("FAULT:", fault)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
