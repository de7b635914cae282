"""How long `python -m dualparal generate` takes to its first step, as a person at a terminal sees it, and how much CPU.

    python -m benchmarks.startup [--runs 7] [--against TREE]

The pocket model, files in the page cache. "begins" is when the bar appears, "first step" when it has moved; CPU seconds are
those of all its processes until then. `--against`: another checkout of the repository, run in turn with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.common import hardware, table

HERE = Path(__file__).resolve().parents[1]
STEPS = re.compile(rb"\| (\d+)/\d+ steps")


def cpu_s(pid: int) -> float:
    """CPU seconds so far of a process and all below it."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def start(tree: Path, prompt: str, outputs: str) -> tuple[float, float, float]:
    """One run of the command in the checkout `tree`: seconds until it begins and until its first step, CPU seconds by then."""
    command = [sys.executable, "-m", "dualparal", "generate", "--prompt", prompt, "--seconds", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "DUALPARAL_OUTPUTS": outputs}
    started_s = time.monotonic()
    process = subprocess.Popen(
        command, cwd=outputs, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stderr is not None
    seen, begins_s = b"", 0.0
    try:
        while piece := process.stderr.read(4096):
            seen += piece
            steps = [int(found) for found in STEPS.findall(seen)]
            begins_s = begins_s or (time.monotonic() - started_s if steps else 0.0)
            if any(steps):
                return begins_s, time.monotonic() - started_s, cpu_s(process.pid)
        raise SystemExit(f"no step was made: {seen.decode(errors='replace')}")
    finally:
        process.terminate()
        process.stderr.read()
        process.wait()


def main() -> None:
    """Print a Markdown table of medians, with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each kind; one more before them warms up")
    parser.add_argument("--against", type=Path, help="another checkout of the repository")
    options = parser.parse_args()
    trees = {"this tree": HERE, **({str(options.against): options.against} if options.against else {})}
    seen: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    print(f"{hardware()}\n", flush=True)
    with tempfile.TemporaryDirectory() as outputs:
        for run in range(options.runs + 1):
            for kind in ("seen before", "new"):
                for name, tree in trees.items():
                    prompt = "a red circle moves right" if kind == "seen before" else f"a circle {secrets.token_hex(4)}"
                    found = start(tree.resolve(), prompt, outputs)
                    if run:
                        seen.setdefault((kind, name), []).append(found)
    rows = [
        (name, kind, *(f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in zip(*runs, strict=True)))
        for (kind, name), runs in seen.items()
    ]
    print(table(("tree", "prompt", "begins after s", "first step after s", "CPU s by then"), rows))


if __name__ == "__main__":
    main()
