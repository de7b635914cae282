"""Two ranks against one, one thread each, on a mid-size random Wan where compute dominates: of a possible 2, how much?"""

from __future__ import annotations

import argparse
import tempfile

from benchmarks.common import checkpoint, hardware, table, timed_job
from dualparal import Engine, GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    folder = checkpoint("mid", num_layers=8, num_heads=8, head_dim=32, ffn_dim=1024)
    request = GenerationRequest(
        prompt="scaling", latents_num=4 * options.blocks + 4, num_per_block=4, num_cat=4, num_inference_steps=options.steps,
        height=128, width=128, seed=0,
    )  # fmt: skip
    warm_up = request.model_copy(update={"latents_num": 4, "num_inference_steps": 1})
    print(hardware())
    seconds: dict[int, float] = {}
    for ranks in options.ranks:
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(folder, ranks=ranks, device="cpu", threads=1, outputs=outputs) as engine,
        ):
            timed_job(engine, warm_up)
            seconds[ranks] = timed_job(engine, request)[1]
    base = seconds[options.ranks[0]]
    items = options.blocks * options.steps
    rows = [[r, f"{s:.1f}", f"{s / items * 1000:.0f}", f"{base / s:.2f}"] for r, s in seconds.items()]
    print(table(["ranks", "denoise s", "ms per block step", f"speed-up over {options.ranks[0]}"], rows))


if __name__ == "__main__":
    main()
