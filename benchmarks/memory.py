"""Resident memory per rank: constant in the number of latents, falling with the number of ranks."""

from __future__ import annotations

import argparse
import tempfile
import threading

import psutil

from benchmarks.common import checkpoint, hardware, table
from dualparal import Engine, GenerationRequest


def peak_rss(engine: Engine, latents_num: int) -> dict[str, float]:
    """Run one job and sample each rank's resident memory (MiB above an idle worker is not subtracted)."""
    processes = {name: psutil.Process(about["pid"]) for name, about in engine.workers.items() if "pid" in about}
    peaks = dict.fromkeys(processes, 0.0)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            for name, process in processes.items():
                peaks[name] = max(peaks[name], process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=sample)
    watcher.start()
    request = GenerationRequest(
        prompt="memory", latents_num=latents_num, num_per_block=4, num_cat=4, num_inference_steps=4, height=64, width=64, seed=0
    )
    engine.submit(request).result()
    done.set()
    watcher.join()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--latents", type=int, nargs="+", default=[12, 48, 192])
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
                peaks = peak_rss(engine, latents_num)
                rows.append(
                    [ranks, latents_num, f"{max(weights):.0f}", " ".join(f"{peak:.0f}" for _, peak in sorted(peaks.items()))]
                )
    print(table(["ranks", "latents", "largest share of weights MiB", "peak resident MiB, rank 0 ..."], rows))


if __name__ == "__main__":
    main()
