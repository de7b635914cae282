"""Hundreds of small jobs on one engine: memory, open files, threads and processes must end where they began.

Most jobs are left alone, some are stopped while they run or wait, some fail (their folder cannot be written) and are resumed.
After every job the front end and each worker are looked at; the table compares medians of the second eighth with those of the
last quarter, so that what is loaded once does not count as growth. Exit code 1 when something grew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.errors import DualParalError

PATIENCE_S = 600.0
WORDS = ("memory MiB", "open files", "threads")
MOST_GROWTH = {"memory MiB": 6.0, "open files": 0.0, "threads": 0.0, "processes": 0.0, "shared memory files": 0.0}


def request(number: int) -> GenerationRequest:
    """A small video; lengths, seeds and prompts differ."""
    return GenerationRequest(
        prompt=f"soak {number}", seed=number, latents_num=5 + 4 * (number % 3), num_per_block=4, num_cat=2,
        num_inference_steps=4, height=32, width=32,
    )  # fmt: skip


class Samples:
    """What the engine's processes held after each job: `rows[what]` is one number per job."""

    def __init__(self, engine: Engine) -> None:
        me = psutil.Process()
        self.processes = {"front end": me} | {name: psutil.Process(about["pid"]) for name, about in engine.workers.items()}
        self.rows: dict[str, list[float]] = defaultdict(list)

    def take(self) -> None:
        """Look at every process once."""
        gc.collect()
        for name, process in self.processes.items():
            with process.oneshot():
                found = (process.memory_info().rss / 2**20, float(process.num_fds()), float(process.num_threads()))
            for word, value in zip(WORDS, found, strict=True):
                self.rows[f"{name}: {word}"].append(value)
        self.rows["all: processes"].append(float(len(psutil.Process().children(recursive=True))))
        shared = {line.split()[-1] for process in self.processes.values() for line in maps_of(process) if "/dev/shm/" in line}
        self.rows["all: shared memory files"].append(float(len(shared)))

    def compared(self) -> list[tuple[str, float, float]]:
        """(what, median of the second eighth, median of the last quarter)."""
        found = []
        for what, values in self.rows.items():
            eighth = max(1, len(values) // 8)
            found.append((what, statistics.median(values[eighth : 2 * eighth]), statistics.median(values[-2 * eighth :])))
        return found


def maps_of(process: psutil.Process) -> list[str]:
    """Lines of a process's memory map."""
    return Path(f"/proc/{process.pid}/maps").read_text().splitlines()


def run_one(engine: Engine, number: int, counts: Counter[str]) -> None:
    """One job of the mix, to its end."""
    job = engine.submit(request(number), owner=f"owner {number % 7}")
    block = job.folder.path / "block_0001.ts"
    if number % 10 == 3:
        threading.Timer(0.05 * (number % 7), job.cancel).start()
    elif number % 10 == 7 and number % 3:
        block.mkdir()
    with contextlib.suppress(DualParalError):
        job.result(PATIENCE_S)
    counts[job.state] += 1
    if job.state == "failed":
        block.rmdir()
        engine.resume(job.id).result(PATIENCE_S)
        counts["failed, then resumed"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print(hardware(), flush=True)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DUALPARAL_CACHE"] = f"{folder}/cache"
        engine = Engine(checkpoint("tiny"), ranks=options.ranks, device="cpu", threads=1, outputs=f"{folder}/outputs")
        with engine:
            samples = Samples(engine)
            started_s = time.monotonic()
            for number in range(options.jobs):
                run_one(engine, number, counts)
                samples.take()
                if number % 20 == 19:
                    print(f"{number + 1} jobs, {time.monotonic() - started_s:.0f} s", flush=True)
            seconds = time.monotonic() - started_s
            num_restarts = sum(replica.num_restarts for replica in engine.replicas)
    print(", ".join(f"{name} {count}" for name, count in counts.items()), f"in {seconds:.0f} s, {num_restarts} restarts")
    rows, faults = [], [] if num_restarts == 0 else ["workers were started anew: nothing can be compared"]
    for what, first, last in samples.compared():
        rows.append([what, f"{first:g}" if first == int(first) else f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}"])
        if last - first > MOST_GROWTH[what.split(": ")[1]]:
            faults.append(f"{what} grew from {first:.1f} to {last:.1f}")
    print(table(["what", "second eighth", "last quarter", "difference"], rows))
    for fault in faults:
        print("FAULT:", fault)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
