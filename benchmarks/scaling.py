"""Two ranks against one, one thread each, on a mid-size random Wan where compute dominates: of a possible 2, how much?"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.common import checkpoint, hardware, table, timed_job
from dualparal import Engine, GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    folder = checkpoint("mid", num_layers=8, num_heads=8, head_dim=32, ffn_dim=1024)
    request = GenerationRequest(
        prompt="scaling", latents_num=4 * options.blocks + 4, num_per_block=4, num_cat=4, num_inference_steps=options.steps,
        height=128, width=128, seed=0, schedule="paper", context="recomputed",
    )  # fmt: skip
    warm_up = request.model_copy(update={"latents_num": 4, "num_inference_steps": 1})
    print(hardware())
    seconds: dict[int, float] = {}
    stages: list[list[str]] = []
    for ranks in options.ranks:
        with (
            tempfile.TemporaryDirectory() as outputs,
            Engine(folder, ranks=ranks, device="cpu", threads=1, outputs=outputs) as engine,
        ):
            timed_job(engine, warm_up)
            result, seconds[ranks] = timed_job(engine, request)
            stages += stage_rows(ranks, Path(result.path).parent)
    base = seconds[options.ranks[0]]
    items = options.blocks * options.steps
    rows = [[r, f"{s:.1f}", f"{s / items * 1000:.0f}", f"{base / s:.2f}"] for r, s in seconds.items()]
    print(table(["ranks", "denoise s", "ms per block step", f"speed-up over {options.ranks[0]}"], rows))
    print()
    print(table(["ranks", "stage", "work s", "mean ms per block step", "between first and last step", "idle s"], stages))


def stage_rows(ranks: int, folder: Path) -> list[list[str]]:
    """What each stage, the decoder and the encoder did in a finished job, from its timeline."""
    spans = defaultdict(list)
    for span in json.loads((folder / "timeline.json").read_text()):
        spans[span["stage"]].append((span["start_s"], span["end_s"]))
    rows = []
    for stage, times in sorted(spans.items()):
        work = sum(end - start for start, end in times)
        extent = max(end for _, end in times) - min(start for start, _ in times)
        mean_ms = work / len(times) * 1000
        rows.append([str(ranks), stage, f"{work:.1f}", f"{mean_ms:.0f}", f"{extent:.1f}", f"{extent - work:.1f}"])
    return rows


if __name__ == "__main__":
    main()
