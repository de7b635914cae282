"""How time and memory grow with GPUs, length, resolution and the link between hosts: the tables of docs/scaling.md.

All of it is arithmetic on the event model and the memory plan; nothing is run. The model is held against runs in
`benchmarks.event_model` and `benchmarks.scaling`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.common import table
from dualparal.method.event_model import Forecast, forecast
from dualparal.method.grid import Grid
from dualparal.method.rules import rules_of
from dualparal.planning.layer_split import split_layers
from dualparal.planning.memory import memory_plan, workload_of
from dualparal.planning.sizes import PUBLISHED_MODELS, DiTSizes
from dualparal.planning.work import Workload
from dualparal.presets import Preset, complete, load_presets
from dualparal.request import GenerationRequest, Settings


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job on `ranks` GPUs, in `guidance` rings."""

    preset: Preset
    ranks: int
    seconds: float
    schedule: str = "paper"
    context: str = "recomputed"
    guidance: int = 1

    @property
    def grid(self) -> Grid:
        return Grid.of(self.ranks, self.guidance)

    @property
    def request(self) -> Settings:
        asked = GenerationRequest(prompt="any", seconds=self.seconds, schedule=self.schedule, context=self.context)
        return complete(asked, self.preset, ranks=self.grid.stages, rings=self.guidance)

    @property
    def workload(self) -> Workload:
        config, _, _ = PUBLISHED_MODELS[self.preset.model]
        layers = [len(stage) for stage in split_layers(DiTSizes.of(config).num_layers, self.grid.stages)]
        return workload_of(self.request, config, layers, rules=rules_of(self.request))

    def message_bytes(self) -> int:
        """Largest message between two ranks: activations of both guidance halves in bf16."""
        work = self.workload
        window = max(sum(work.schedule.window_frames(item)) for item in work.schedule.items)
        return work.num_halves * window * work.tokens_per_frame * work.sizes.dim * 2

    def forecast(self, flops: float, link_bytes_per_s: float = float("inf")) -> Forecast:
        work = self.workload
        transfer = self.message_bytes() / link_bytes_per_s
        cost = work.cost(flops)
        return forecast(
            work.schedule, self.grid.stages, lambda item, rank: cost(item, self.grid.stage_of(rank)), rings=self.guidance,
            transfer=transfer,
        )  # fmt: skip

    def gigabytes_per_gpu(self) -> float:
        """Without the codec, which has a card of its own here."""
        preset = self.preset
        plan = memory_plan(self.workload, height=preset.height, width=preset.width, rings=self.grid.rings)
        return plan.most / 1e9


def by_gpus(preset: Preset, seconds: float, flops: float) -> str:
    rows = []
    alone = Case(preset=preset, ranks=1, seconds=seconds).forecast(flops).total
    for ranks in (1, 2, 4, 8, 16):
        case = Case(preset=preset, ranks=ranks, seconds=seconds)
        seen = case.forecast(flops)
        early = Case(preset=preset, ranks=ranks, seconds=seconds, schedule="preview", context="cached").forecast(flops)
        numbers = (seen.total / 60, alone / seen.total, 100 * sum(seen.busy) / ranks, seen.first_block / 60,
                   early.first_block / 60, case.gigabytes_per_gpu())  # fmt: skip
        rows.append([ranks, *(f"{number:.1f}" for number in numbers)])
    heads = ["GPUs", "minutes", "speed-up", "busy %", "first frames, min (paper)", "(preview, cached)", "GB a GPU"]
    return table(heads, rows)


def by_rings(preset: Preset, seconds: float, flops: float) -> str:
    """One ring of all GPUs against two of half as many."""
    rows = []
    for ranks in (2, 4, 8, 16):
        row: list[object] = [ranks]
        for guidance in (1, 2):
            case = Case(preset=preset, ranks=ranks, seconds=seconds, schedule="preview", context="cached", guidance=guidance)
            seen = case.forecast(flops)
            row += [f"{seen.first_block / 60:.1f}", f"{seen.total / 60:.1f}", f"{case.gigabytes_per_gpu():.1f}"]
        rows.append(row)
    one, two = (["first frames, min", "all, min", "GB a GPU"], ["two rings: first", "all", "GB"])
    return table(["GPUs", *one, *two], rows)


def by_length(preset: Preset, ranks: int, flops: float) -> str:
    rows = []
    for seconds in (5, 10, 30, 60, 300):
        case = Case(preset=preset, ranks=ranks, seconds=seconds)
        seen = case.forecast(flops)
        numbers = (seen.total / 60, seen.total / seconds, 100 * sum(seen.busy) / ranks, case.gigabytes_per_gpu())
        rows.append([seconds, *(f"{number:.1f}" for number in numbers)])
    return table(["seconds of video", "minutes", "seconds a second", "busy %", "GB a GPU"], rows)


def by_link(preset: Preset, ranks: int, seconds: float, flops: float) -> str:
    rows = []
    case = Case(preset=preset, ranks=ranks, seconds=seconds)
    best = case.forecast(flops).total
    for name, gigabits in (("1 Gbit/s", 1), ("10 Gbit/s", 10), ("25 Gbit/s", 25), ("100 Gbit/s", 100), ("400 Gbit/s", 400)):
        seen = case.forecast(flops, gigabits * 1e9 / 8)
        seconds_each = case.message_bytes() / (gigabits * 1e9 / 8)
        rows.append([name, f"{case.message_bytes() / 1e6:.0f}", f"{seconds_each:.3f}", f"{seen.total / best:.2f}"])
    return table(["every link", "MB a message", "seconds a message", "time against no delay"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="wan2.1-14b-480p")
    parser.add_argument("--tflops", type=float, default=300.0, help="10^12 FLOP/s that one GPU reaches in bf16")
    options = parser.parse_args()
    presets = load_presets()
    preset, flops = presets[options.preset], options.tflops * 1e12
    print(f"{preset.title}, {options.tflops:g} TFLOP/s a GPU\n\n60 s of video:\n{by_gpus(preset, 60, flops)}")
    print(f"\n60 s of video, preview with cached context:\n{by_rings(preset, 60, flops)}")
    print(f"\n4 GPUs:\n{by_length(preset, 4, flops)}")
    print(f"\n8 GPUs, 60 s, by link:\n{by_link(preset, 8, 60, flops)}")


if __name__ == "__main__":
    main()
