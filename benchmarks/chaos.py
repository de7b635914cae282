"""Many small jobs from several clients while workers are killed, jobs stopped, clients leave, folders refuse to be written and
the disk fills to its last byte (a small file system of memory, where mounting one is allowed).

Afterwards every job must have ended exactly once, every finished block must be on disk with the bits of the calm run, and
nothing may be left behind. Exit code 1 when anything is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest
from dualparal.errors import DualParalError, OutputError, QueueFull
from dualparal.events import FINAL, BlockReady, Finished
from dualparal.jobs.job import Job
from dualparal.media.ffmpeg import run_ffmpeg

PATIENCE_S = 900.0


def request(kind: int) -> GenerationRequest:
    """One of a few small videos of different length."""
    return GenerationRequest(
        prompt=f"chaos {kind}", seed=kind, latents_num=5 + 4 * kind, num_per_block=4, num_cat=2, num_inference_steps=6,
        height=32, width=32,
    )  # fmt: skip


class Chaos:
    """One run on one engine."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.random = random.Random(options.seed)
        self.lock = threading.Lock()
        self.jobs: list[tuple[Job, int, bool]] = []  # with its kind, and whether its folder was spoilt
        self.counts: Counter[str] = Counter()
        self.is_over = threading.Event()
        self.full: list[tuple[float, float]] = []  # when the disk was full, seconds since the epoch

    def client(self, name: str, num_jobs: int) -> None:
        """Submit jobs one after another, sometimes stop one, sometimes leave without waiting."""
        dice = random.Random(f"{self.options.seed} {name}")
        mine: list[Job] = []
        while len(mine) < num_jobs:
            kind = dice.randrange(self.options.kinds)
            try:
                job = self.engine.submit(request(kind), owner=name)
            except QueueFull:
                self.counts["refused: queue full"] += 1
                time.sleep(0.5)
                continue
            except OutputError:
                self.counts["refused: disk full"] += 1
                time.sleep(0.5)
                continue
            is_spoilt = dice.random() < self.options.spoil and kind > 0
            if is_spoilt:
                (job.folder.path / "block_0001.ts").mkdir(exist_ok=True)
            with self.lock:
                self.jobs.append((job, kind, is_spoilt))
            mine.append(job)
            if dice.random() < self.options.cancel:
                threading.Timer(dice.random() * 3, job.cancel).start()
                self.counts["stops asked for"] += 1
            if dice.random() < 0.5:
                time.sleep(dice.random() * 0.5)
            elif dice.random() < 0.5:
                self.wait(job)
        self.counts["clients that left without waiting"] += 1

    def killer(self) -> None:
        """Kill a random worker of a replica that is ready, at random times."""
        for _ in range(self.options.kills):
            if self.is_over.wait(self.random.random() * 2 * self.options.every_s):
                return
            ready = [replica for replica in self.engine.replicas if replica.state == "ready" and replica.at_work()]
            if not ready:
                continue
            name, about = self.random.choice(sorted(self.random.choice(ready).workers.items()))
            number = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            try:
                os.kill(about["pid"], number)
                self.counts[f"killed: {name}" if number == signal.SIGKILL else "SIGTERM to a worker, which it ignores"] += 1
            except ProcessLookupError:
                continue

    def filler(self) -> None:
        """Fill the disk now and then for a few seconds."""
        file = self.engine.outputs.parent / "filler"
        while not self.is_over.wait(self.options.fill_every_s * (0.5 + self.random.random())):
            began_s = time.time()
            while time.time() - began_s < 3 and not self.is_over.is_set():
                fill(file)  # again and again: what others free or give up is taken too
                time.sleep(0.02)
            file.unlink()
            self.full.append((began_s - 1, time.time() + 1))
            self.counts["times the disk was full"] += 1

    def was_full(self, time_s: float) -> bool:
        return any(began_s <= time_s <= ended_s for began_s, ended_s in self.full)

    def wait(self, job: Job) -> None:
        with contextlib.suppress(DualParalError):
            job.result(PATIENCE_S)

    def run(self) -> float:
        """The whole storm; returns its seconds."""
        started_s = time.monotonic()
        share = -(-self.options.jobs // self.options.clients)
        clients = [threading.Thread(target=self.client, args=(f"client {n}", share)) for n in range(self.options.clients)]
        others = [threading.Thread(target=self.killer)]
        if self.options.disk_mb:
            others.append(threading.Thread(target=self.filler))
        for thread in (*clients, *others):
            thread.start()
        for thread in clients:
            thread.join()
        for job, _, _ in self.jobs:
            self.wait(job)
        self.is_over.set()
        for thread in others:
            thread.join()
        return time.monotonic() - started_s

    def faults(self, calm: dict[int, Job]) -> list[str]:
        """What should not be, in words."""
        found = []
        for job, kind, is_spoilt in self.jobs:
            events = job.folder.events()
            finals = [event for event in events if isinstance(event, FINAL)]
            ready = [event for event in events if isinstance(event, BlockReady)]
            self.counts[f"ended: {type(finals[-1]).__name__.lower() if finals else 'never'}"] += 1
            self.counts["went on by itself"] += job.num_interruptions
            self.counts["finished blocks"] += len(ready)
            if len(finals) != 1:
                found.append(f"{job.id} has {len(finals)} final events")
            if [event.block for event in ready] != list(range(len(ready))):
                found.append(f"{job.id} told of blocks {[event.block for event in ready]}")
            for event in ready:
                if Path(event.path).read_bytes() != (calm[kind].folder.path / Path(event.path).name).read_bytes():
                    found.append(f"{job.id} block {event.block} has other bits than the calm run")
            if finals and isinstance(finals[0], Finished):
                if job.folder.video.read_bytes() != calm[kind].folder.video.read_bytes():
                    found.append(f"{job.id} video has other bits than the calm run")
            elif ready and finals and not Path(finals[0].path or "-").is_file():  # type: ignore[attr-defined]
                if self.was_full(finals[0].time_s):
                    self.counts["segments kept, not joined: the disk was full"] += 1
                else:
                    found.append(f"{job.id} has finished blocks and no video")
            self.counts["folders that could not be written"] += is_spoilt
            if any(path.name.endswith(".part") for path in job.folder.path.rglob("*")):
                found.append(f"{job.id} left something half-written")
        return found


def fill(file: Path) -> None:
    """Grow `file` until the disk has nothing left."""
    with file.open("ab", buffering=0) as opened:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    opened.write(bytes(size))
            except OSError:
                continue


@contextlib.contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[bool]:
    """A file system of `size_mb` at `folder`; False where mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    is_mounted = size_mb > 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def check_playable(job: Job) -> None:
    """Every segment decodes without a word of complaint."""
    for segment in job.folder.segments():
        run_ffmpeg(["-xerror", "-f", "mpegts", "-i", f"file:{segment}", "-f", "null", "-"], what=f"decoding {segment.name}")


def workers_alive() -> list[psutil.Process]:
    """Children that are not Python's resource tracker."""
    return [p for p in psutil.Process().children(recursive=True) if not any("resource_tracker" in w for w in p.cmdline())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--kinds", type=int, default=4, help="different requests")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every_s", type=float, default=20.0, help="mean pause between kills")
    parser.add_argument("--cancel", type=float, default=0.15, help="share of jobs that are stopped")
    parser.add_argument("--spoil", type=float, default=0.05, help="share of jobs whose folder cannot be written")
    parser.add_argument("--disk_mb", type=int, default=400, help="size of the disk that is filled; 0: fill none")
    parser.add_argument("--fill_every_s", type=float, default=30.0, help="mean pause between fillings")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(hardware(), flush=True)
    folder = checkpoint("tiny")
    with tempfile.TemporaryDirectory() as disk, small_disk(Path(disk), options.disk_mb) as is_small:
        options.disk_mb *= is_small
        engine = Engine(
            folder, ranks=options.ranks, replicas=options.replicas, device="cpu", threads=1, outputs=f"{disk}/outputs",
            auto_resume=True,
            max_queue=24, max_per_owner=12,
        )  # fmt: skip
        num_fds = psutil.Process().num_fds()
        with engine:
            calm = {kind: engine.submit(request(kind)) for kind in range(options.kinds)}
            for job in calm.values():
                job.result(PATIENCE_S)
                check_playable(job)
            chaos = Chaos(engine, options)
            rss_before = psutil.Process().memory_info().rss
            seconds = chaos.run()
            rss_after = psutil.Process().memory_info().rss
            left = engine.jobs()
        faults = chaos.faults(calm)
        faults += [f"{job.id} is still open" for job in left]
        faults += [f"process {process.pid} was left behind" for process in workers_alive()]
        if psutil.Process().num_fds() > num_fds + 2:
            faults.append(f"{psutil.Process().num_fds() - num_fds} files or pipes were left open")
    rows = [["jobs", len(chaos.jobs)], *sorted(chaos.counts.items()), ["seconds", f"{seconds:.0f}"],
            ["front end's memory before, after (MiB)", f"{rss_before / 2**20:.0f}, {rss_after / 2**20:.0f}"],
            ["worker groups started anew", sum(replica.num_restarts for replica in engine.replicas)],
            ["faults", len(faults)]]  # fmt: skip
    print(table(["what", "count"], rows))
    for fault in faults:
        print("FAULT:", fault)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
