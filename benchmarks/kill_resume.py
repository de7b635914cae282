"""kill -9 at random moments, of one worker, all workers, the front end, or everything; afterwards every bit must be right.

A child process serves job after job and takes them up again, by supervision (its workers were killed) or with
`Engine.recover()` (it was killed itself and is started anew). At the end segments and mp4 of every job must equal those of a
run that was left alone, and nothing that was killed may have left a process behind. Exit code 1 when it is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.engine import dispatcher
from dualparal.events import FINAL, Finished, Interrupted
from dualparal.files import write_atomically
from dualparal.jobs import recovery
from dualparal.jobs.folder import JOB_ID, JobFolder, list_jobs
from dualparal.ring.saved_sweeps import read_state

START_S = 600.0
GONE_WITHIN_S = 20.0
KINDS = {"one rank": 6, "codec": 3, "all workers": 3, "front end": 3, "everything": 5}  # and how often, in 20
WORKERS = "workers.json"  # what the child tells of its workers
STOP = "stop"  # tells the child to take no new jobs


def request(seed: int) -> GenerationRequest:
    """Long enough to save several sweeps; every other job keeps its left context as K and V, and recomputes it now and then;
    every third skips steps."""
    return GenerationRequest(
        prompt="killed again and again", seed=seed, latents_num=256, num_per_block=4, num_cat=2, num_inference_steps=48,
        height=32, width=32, context="cached" if seed % 2 else "recomputed", schedule="preview" if seed % 4 > 1 else "paper",
        cache_interval=1 + (seed % 3 == 2),
    )  # fmt: skip


def engine_on(outputs: Path, ranks: int, experts: int) -> Engine:
    model = checkpoint("tiny") if experts == 1 else checkpoint("tiny-two", num_experts=2)
    return Engine(model, ranks=ranks, device="cpu", threads=1, outputs=outputs, auto_resume=True)


def child(outputs: Path, ranks: int, experts: int) -> None:
    """Go on with what is there, then make new jobs until told to stop; end when all have ended."""
    # A job here is killed more often than one that kills the program would be let.
    recovery.MAX_INTERRUPTIONS = dispatcher.MAX_INTERRUPTIONS = 10**6
    engine = engine_on(outputs, ranks, experts)
    engine.recover()
    taken = {path.name for path in outputs.iterdir() if JOB_ID.fullmatch(path.name)}
    last_workers: list[int] = []
    with engine:
        while True:
            is_last = (outputs / STOP).exists()
            if not is_last and len(engine.jobs()) < 2:
                name = next(name for n in range(10**6) if (name := f"{n:06x}") not in taken)
                taken.add(name)
                engine.submit(request(int(name, 16)), job_id=name)
            workers = {name: about["pid"] for name, about in engine.workers.items()} if engine.state == "ready" else {}
            if sorted(workers.values()) != last_workers:
                last_workers = sorted(workers.values())
                write_atomically(outputs / WORKERS, json.dumps(workers))
            if is_last and not engine.jobs():
                return
            time.sleep(0.02)


class Siege:
    """The child, and the kills."""

    def __init__(self, outputs: Path, ranks: int, experts: int, seed: int) -> None:
        self.outputs, self.flags = outputs, ["--ranks", str(ranks), "--experts", str(experts)]
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.moments: set[tuple[str, int, int]] = set()
        self.faults: list[str] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        (self.outputs / WORKERS).unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.kill_resume", "--child", str(self.outputs), *self.flags]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    def kill_once(self) -> str:
        """Wait until a sweep has been saved after the last kill, then a little, then kill; says what."""
        before, deadline_s = self._newest(), time.monotonic() + START_S
        while self._newest()[1] <= before[1] or not self._workers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the child does not go on (exit code {self.process.poll()})")
            time.sleep(0.02)
        time.sleep(self.dice.random() * 4)
        kind = self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        family = psutil.Process(self.process.pid).children(recursive=True)
        self._kill(kind)
        self.counts[f"killed: {kind}"] += 1
        job, _ = self._newest()
        moment = progress(job) if job else (0, 0)
        self.moments.add((job.job_id if job else "", *moment))
        if kind in ("front end", "everything"):
            self.process.wait()
            _, alive = psutil.wait_procs(family, GONE_WITHIN_S)
            self.faults += [f"process {process.pid} outlived the front end" for process in alive]
            self.process = self._start()
        return f"{kind}; job {job.job_id if job else 'none'} saved up to item {moment[0]}, {moment[1]} blocks"

    def _kill(self, kind: str) -> None:
        workers = self._workers()
        if kind == "everything":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif kind == "front end":
            self.process.kill()
        else:
            named = {
                "one rank": [self.dice.choice([name for name in sorted(workers) if name != "codec"] or [""])],
                "codec": ["codec"], "all workers": sorted(workers),
            }[kind]  # fmt: skip
            for name in named:
                if name in workers:
                    os.kill(workers[name], signal.SIGKILL)
            (self.outputs / WORKERS).unlink(missing_ok=True)

    def _workers(self) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads((self.outputs / WORKERS).read_text())
        except (OSError, ValueError):
            return {}
        return {name: pid for name, pid in found.items() if psutil.pid_exists(pid)}

    def _newest(self) -> tuple[JobFolder | None, int]:
        """The job whose sweep was saved last, and when, in ns."""
        jobs = list(list_jobs(self.outputs))
        found = [(job, stamp(file)) for job in jobs for file in (job.path / "state").glob("sweep*.safetensors")]
        return max(found, key=lambda pair: pair[1], default=(None, 0))

    def finish(self) -> None:
        """Let the child end its work."""
        (self.outputs / STOP).touch()
        if self.process.wait(START_S) != 0:
            self.faults.append(f"the child ended with {self.process.returncode}")


def stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def progress(job: JobFolder) -> tuple[int, int]:
    """(next item of the saved sweep, finished blocks) of a job on disk."""
    try:
        state, _ = read_state(job.path / "state")
    except OSError:
        return 0, 0
    return (state.next_index, state.num_finished) if state else (0, 0)


def compare(killed: Path, calm: Path) -> tuple[list[str], int]:
    """(what differs, interruptions in the journals)."""
    faults, num_interrupted = [], 0
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
        faults += [f"{job.job_id} left {path.name}" for path in job.path.rglob(".*.part")]
    return faults, num_interrupted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0, help="kill no longer than this")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", type=int, choices=(1, 2), default=1, help="of the tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.ranks, options.experts)
        return 0
    print(hardware(), flush=True)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        killed.mkdir()
        siege = Siege(killed, options.ranks, options.experts, options.seed)
        try:
            for number in range(options.kills):
                if time.monotonic() - started_s > 60 * options.minutes:
                    break
                what = siege.kill_once()
                print(f"kill {number + 1}, after {time.monotonic() - started_s:.0f} s: {what}", flush=True)
            siege.finish()
        finally:
            if siege.process.poll() is None:
                os.killpg(siege.process.pid, signal.SIGKILL)
                siege.process.wait()
        jobs = [(job.job_id, job.request()) for job in reversed(list(list_jobs(killed)))]
        with engine_on(calm, options.ranks, options.experts) as engine:
            for job_id, asked in jobs:
                engine.submit(asked, job_id=job_id).result()
        faults, num_interrupted = compare(killed, calm)
    faults += siege.faults
    rows = [["jobs", len(jobs)], *sorted(siege.counts.items()), ["different saved sweeps", len(siege.moments)],
            ["interruptions in the journals", num_interrupted], ["seconds", f"{time.monotonic() - started_s:.0f}"],
            ["faults", len(faults)]]  # fmt: skip
    print(table(["what", "count"], rows))
    for fault in faults:
        print("FAULT:", fault)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
