"""The engine's own time per block step: a null model on 1, 2 and 3 ranks, and where the time goes on rank 0."""

from __future__ import annotations

import argparse
import tempfile

from benchmarks.common import checkpoint, hardware, table, timed_job
from dualparal import Engine, GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    folder = checkpoint("tiny")
    request = GenerationRequest(
        prompt="overhead",
        latents_num=52,
        num_per_block=4,
        num_cat=4,
        num_inference_steps=200,
        height=32,
        width=32,
        seed=0,
        schedule="paper",
        context="recomputed",
    )
    warm_up = request.model_copy(update={"latents_num": 4, "num_inference_steps": 1})
    print(hardware())
    rows = []
    for ranks in options.ranks:
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(
                folder, ranks=ranks, device="cpu", threads=1, outputs=outputs, worker_hook="benchmarks.null_stage:install"
            ) as engine,
        ):
            timed_job(engine, warm_up)
            seconds = timed_job(engine, request)[1]
            items = 12 * 200
            rows.append([ranks, items, f"{seconds:.2f}", f"{seconds / items * 1000:.3f}"])
    print(table(["ranks", "block steps", "denoise s", "ms per block step"], rows))


if __name__ == "__main__":
    main()
