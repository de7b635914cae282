"""What 8-bit weights cost on the CPU: bytes held, error, time, against unquantised weights in the same run.

    python -m benchmarks.low_memory [--dtype bfloat16] [--kinds fp8,int8]

A mid-size random model (6 layers of width 512, weights drawn like a trained model's: std 0.02), one stage, the first items of a
`paper` schedule. The error is that of one guided prediction from the same latents and text, relative to float32's, as root mean
square; the time is the median of the items of one shape, variants by turns. int8 is left out where torchao is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from benchmarks.common import hardware, table
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules, make_schedule
from dualparal.model.layout import Checkpoint
from dualparal.model.low_memory import stored_bytes
from dualparal.model.stage import JobShape, Stage
from dualparal.model.tiny import write_tiny_checkpoint
from dualparal.planning.sizes import DiTSizes

SHAPE = {"num_layers": 6, "num_heads": 8, "head_dim": 64, "ffn_dim": 2048}
LATENT_PX = 8  # height and width of the latents: 16 tokens a frame
STEPS = 4


def write_model(folder: Path) -> Path:
    """A mid-size checkpoint whose linear weights have the size of a trained Wan's."""
    write_tiny_checkpoint(folder, **SHAPE)
    dit = WanTransformer3DModel.from_pretrained(folder / "transformer")
    generator = torch.Generator().manual_seed(0)
    for name, value in dit.named_parameters():
        if name.startswith("blocks.") and value.ndim == 2:
            value.data.normal_(std=0.02, generator=generator)
    dit.save_pretrained(folder / "transformer")
    return folder


class Runner:
    """One stage that holds the whole model, in the middle of a job."""

    def __init__(self, folder: Path, dtype: str, kind: str | None) -> None:
        checkpoint = Checkpoint(folder)
        self.stage = Stage(checkpoint, range(checkpoint.num_layers), dtype=dtype, device="cpu", quantization=kind)
        self.schedule = make_schedule(Rules(), BlockPlan.of(28, 4, 4), (0,) * STEPS)
        generator = torch.Generator().manual_seed(1)
        texts = [[torch.randn(1, 64, 32, generator=generator) for _ in range(2)]]
        shape = JobShape(LATENT_PX, LATENT_PX, 2, (5.0, 5.0), (0,) * self.schedule.plan.num_blocks)
        timesteps = torch.linspace(999, 250, STEPS).long()
        self.stage.begin(shape, self.schedule, self.stage.embed_conditions(timesteps, texts))
        self.latents = torch.randn(1, self.stage.channels, 12, LATENT_PX, LATENT_PX, generator=generator)
        self.seconds: dict[int, list[float]] = {}

    def step(self, index: int) -> torch.Tensor:
        """Run item `index`; returns its prediction."""
        item = self.schedule.items[index]
        num_frames = sum(self.schedule.window_frames(item))
        started_s = time.perf_counter()
        out = self.stage.run(item, self.latents[:, :, :num_frames])
        self.seconds.setdefault(num_frames, []).append(time.perf_counter() - started_s)
        assert out is not None
        return out

    @property
    def median_s(self) -> float:
        """Of the items with the commonest window."""
        times = sorted(max(self.seconds.values(), key=len))
        return times[len(times) // 2]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kinds", default="fp8,int8")
    parser.add_argument("--items", type=int, default=6)
    options = parser.parse_args()
    has_torchao = importlib.util.find_spec("torchao") is not None
    kinds = [kind for kind in options.kinds.split(",") if kind != "int8" or has_torchao]
    before = hardware()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(Path(place))
        exact = Runner(folder, "float32", None)
        runners = {"": Runner(folder, options.dtype, None), **{kind: Runner(folder, options.dtype, kind) for kind in kinds}}
        errors: dict[str, list[float]] = {kind: [] for kind in runners}
        for index in range(options.items):
            right = exact.step(index)
            for kind, runner in runners.items():
                errors[kind].append(float((runner.step(index) - right).norm() / right.norm()))
        sizes = DiTSizes.of(Checkpoint(folder).config("transformer")).share(range(SHAPE["num_layers"]))
    rows = []
    for kind, runner in runners.items():
        held, planned = stored_bytes(runner.stage.models[0]), sizes.num_bytes(options.dtype, kind or None)
        rows.append((
            f"{options.dtype}, {kind}" if kind else options.dtype, f"{held / 1e6:.1f}", f"{planned / 1e6:.1f}",
            f"{held / stored_bytes(runners[''].stage.models[0]):.2f}", f"{max(errors[kind]):.4f}",
            f"{runner.median_s:.2f}", f"{runner.median_s / runners[''].median_s:.2f}",
        ))  # fmt: skip
    print(f"{before}\n")
    header = ("weights", "held, MB", "plan, MB", "held, ratio", "largest error of a prediction", "item, s", "time, ratio")
    print(table(header, rows))
    if not has_torchao:
        print("\nint8 was not run: torchao is not installed.")


if __name__ == "__main__":
    main()
