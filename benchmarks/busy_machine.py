"""A run alone and beside spinning processes, as workers wait by themselves and as they would if their idle threads spun.

    python -m benchmarks.busy_machine [--spinners 2] [--threads 1,2]

Denoising seconds of the pocket video, all in one run on one machine. "spinning" sets OMP_WAIT_POLICY=ACTIVE as a user could.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.common import hardware, table, timed_job
from dualparal import Engine, GenerationRequest
from dualparal.limits import PASSIVE_WAITING

SPIN = "while True: pass"


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that do nothing as fast as they can."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def denoise_s(engine: Engine, seconds: float) -> float:
    """Of one pocket video; the first job of an engine is a small one, so that everything is loaded."""
    return timed_job(engine, GenerationRequest(prompt="a red circle on blue", seconds=seconds, seed=1))[1]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spinners", type=int, default=2, help="processes beside the run")
    parser.add_argument("--threads", default="default,2", help="threads per process, e.g. default,2")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the video")
    parser.add_argument("--with_active", action="store_true", help="also with idle threads that spin (can take minutes)")
    options = parser.parse_args()
    print(f"{hardware()}\n")
    rows = []
    for policy in ("sleep", "spin")[: 1 + options.with_active]:
        for name in PASSIVE_WAITING:
            os.environ.pop(name, None)
        if policy == "spin":
            os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
        for threads in options.threads.split(","):
            number = None if threads == "default" else int(threads)
            with tempfile.TemporaryDirectory() as outputs, Engine(threads=number, device="cpu", outputs=outputs) as engine:
                denoise_s(engine, 0.3)
                alone = denoise_s(engine, options.seconds)
                with spinning(options.spinners):
                    beside = denoise_s(engine, options.seconds)
                rows.append((policy, engine.threads, f"{alone:.2f}", f"{beside:.2f}", f"{beside / alone:.2f}"))
    header = ("idle threads", "threads", "alone, s", f"beside {options.spinners} spinning processes, s", "ratio")
    print(table(header, rows))


if __name__ == "__main__":
    main()
