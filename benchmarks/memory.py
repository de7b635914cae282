"""Resident memory per rank: constant in the number of latents, falling with the number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
from collections.abc import Iterator

import psutil

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest


def watched(engine: Engine) -> contextlib.AbstractContextManager[dict[str, float]]:
    """`watched_processes` of an engine's workers."""
    return watched_processes({name: about["pid"] for name, about in engine.workers.items() if "pid" in about})


@contextlib.contextmanager
def watched_processes(pids: dict[str, int]) -> Iterator[dict[str, float]]:
    """Peak resident MiB of each process while the body runs, sampled 50 times a second."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    peaks = dict.fromkeys(processes, 0.0)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            for name, process in processes.items():
                peaks[name] = max(peaks[name], process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--latents", type=int, nargs="+", default=[12, 48, 144])
    options = parser.parse_args()
    folder = checkpoint("heavy", num_layers=8, num_heads=16, head_dim=64, ffn_dim=8192)
    print(hardware())
    rows = []
    for ranks in options.ranks:
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(folder, ranks=ranks, device="cpu", threads=1, outputs=outputs) as engine,
        ):
            weights = [about["weight_bytes"] / 2**20 for about in engine.workers.values() if "weight_bytes" in about]
            for latents_num in options.latents:
                request = GenerationRequest(
                    prompt="memory", latents_num=latents_num, num_per_block=4, num_cat=4, num_inference_steps=4, height=64,
                    width=64, seed=0, schedule="paper", context="recomputed",
                )  # fmt: skip
                with watched(engine) as peaks:
                    engine.submit(request).result()
                rows.append(
                    [ranks, latents_num, f"{max(weights):.0f}", " ".join(f"{peak:.0f}" for _, peak in sorted(peaks.items()))]
                )
    print(table(["ranks", "latents", "largest share of weights MiB", "peak resident MiB: codec, rank 0, rank 1 ..."], rows))


if __name__ == "__main__":
    main()
