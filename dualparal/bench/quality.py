"""The quality bench: `python -m dualparal bench quality` makes long videos in several ways and reads from their pixels how
good they are.

Every method gets the same held-out prompts and seeds; the rendered truth is measured beside them, so that every number has
its best possible value next to it. One JSON line per video is appended to `<out>/quality.jsonl`; a run that was stopped goes
on where it was. Needs no torch in this process: videos come from the engine, frames from its PNG files. The report is
`quality_report.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualparal.bench.report import AGAINST, write_report
from dualparal.cli.flags import add_fields, add_model_flags, find_asked, given
from dualparal.cli.parser import Parser
from dualparal.options import EngineOptions, of
from dualparal.paths import expand, not_empty
from dualparal.pocket.judge import block_borders, drift, jumps, repetition
from dualparal.pocket.metrics import adherence, read_frames
from dualparal.pocket.world import SIDE_PX, Prompt, held_out_prompts, random_scene
from dualparal.presets import Limits
from dualparal.request import CONTEXTS, GenerationRequest, frames_of_latents

log = logging.getLogger(__name__)
TRAINING_LATENTS = 21
LENGTH = {"latents_num": 81, "num_inference_steps": 20}
OF_A_BENCH = {"threads": 1}  # more are slower on a busy machine


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a video; `latents_num` 0 means the length asked of the bench, `num_per_block` 0 all in one block."""

    name: str
    num_per_block: int = 0
    num_cat: int = 0
    schedule: str = "paper"
    context: str = "recomputed"
    latents_num: int = 0
    cache_interval: int | None = None
    guidance_stop: float | None = None
    refresh: int | None = None
    max_in_flight: int | None = None
    stagger: int | None = None

    def lengths(self, latents_num: int) -> list[int]:
        """Latents of each block for a video of that many latents."""
        first = self.num_per_block + self.num_cat
        if not self.num_per_block or latents_num <= first:
            return [latents_num]
        whole, rest = divmod(latents_num - first, self.num_per_block)
        return [first, *[self.num_per_block] * whole, *([rest] if rest else [])]


def all_methods() -> dict[str, Method]:
    """Every method by name: "paper 8+4, cached" is that schedule with blocks of 8 latents and 4 of context, K and V cached."""
    methods = [
        Method(name="truth"),
        Method(name="plain, training length", latents_num=TRAINING_LATENTS),
        Method(name="plain, one long pass"),
        Method(name="independent blocks of 8", num_per_block=8),
    ]
    for context, (n, c) in itertools.product(CONTEXTS, [(8, 4), (8, 2), (8, 8), (4, 4), (12, 4)]):
        methods.append(Method(name=f"paper {n}+{c}, {context}", num_per_block=n, num_cat=c, context=context))
    methods.append(_preview("recomputed", 8, 4, 2, 10))
    methods += [
        _preview("cached", n, c, in_flight, stagger)
        for (n, c), (in_flight, stagger) in itertools.product([(8, 8), (4, 4), (8, 4)], [(5, 4), (3, 7), (2, 10)])
    ]
    methods += [
        Method(name=f"paper 8+4, recomputed, step cache {n}", num_per_block=8, num_cat=4, cache_interval=n) for n in (2, 3)
    ]
    methods += [
        Method(name=f"paper {n}+{c}, cached, refresh {every}", num_per_block=n, num_cat=c, context="cached", refresh=every)
        for n, c, every in ((8, 4, 0), (8, 4, 4), (8, 8, 0))
    ]
    methods += [_preview("cached", 8, c, 5, 4, refresh=0) for c in (8, 4)]
    # Of few steps: neighbours a step apart, with the left one as it is or at the block's own noise, and further apart.
    methods += [_preview(context, n, n, 4, 1) for context, n in itertools.product(CONTEXTS, (8, 4))]
    methods += [_preview("cached", 8, 8, in_flight, stagger) for in_flight, stagger in ((2, 2), (4, 2), (1, 4))]
    methods.append(Method(name="paper 8+4, recomputed, guidance until 0.6", num_per_block=8, num_cat=4, guidance_stop=0.6))
    return {method.name: method for method in methods}


def _preview(
    context: str, num_per_block: int, num_cat: int, max_in_flight: int, stagger: int, refresh: int | None = None
) -> Method:
    """`preview` with so many blocks in flight, so many steps apart."""
    name = f"preview {num_per_block}+{num_cat}, {context}, {max_in_flight} x {stagger}"
    return Method(
        name=name if refresh is None else f"{name}, refresh {refresh}", num_per_block=num_per_block, num_cat=num_cat,
        schedule="preview", context=context, max_in_flight=max_in_flight, stagger=stagger, refresh=refresh,
    )  # fmt: skip


def make_frames(engine: Any, method: Method, prompt: Prompt, seed: int, options: argparse.Namespace) -> np.ndarray:
    """The video as [frames, side, side, 3] uint8, from the engine or, for "truth", drawn."""
    latents_num = method.latents_num or options.latents_num
    if method.name == "truth":
        video = random_scene(prompt, np.random.default_rng(seed)).render(frames_of_latents(latents_num))
        return np.rint(video * 255).astype(np.uint8)
    request = GenerationRequest(
        prompt=prompt.caption, height=SIDE_PX, width=SIDE_PX, latents_num=latents_num,
        num_per_block=method.num_per_block or latents_num,
        num_cat=method.num_cat, schedule=method.schedule, context=method.context, seed=seed,
        num_inference_steps=options.num_inference_steps, cache_interval=method.cache_interval,
        guidance_stop=method.guidance_stop, refresh=method.refresh,
        max_in_flight=method.max_in_flight, stagger=method.stagger,
    )  # fmt: skip
    job = engine.submit(request, export_images=True)
    job.result()
    pictures = sorted((job.folder.path / "frames").glob("*.png"))
    frames = np.stack([np.asarray(Image.open(picture).convert("RGB")) for picture in pictures])
    engine.forget(job.id)
    shutil.rmtree(job.folder.path)
    return frames


def measure(frames: np.ndarray, method: Method, prompt: Prompt) -> dict[str, Any]:
    """All metrics of one video; the jumps as sums and counts, so that they can be pooled."""
    num_latents = (len(frames) - 1) // 4 + 1
    reading = read_frames(frames)
    marks = adherence(reading, prompt)
    last = adherence(reading.part(3 * len(frames) // 4, len(frames)), prompt)
    found: dict[str, Any] = {"num_frames": len(frames), **marks, "all_last_quarter": last["all"], **drift(reading, prompt)}
    found["repetition"] = repetition(frames, prompt)
    found["residual"] = float(reading.residual.mean())
    found["start_px"] = [round(float(x), 2) for x in reading.center_px[0]]
    found["area_px"] = float(reading.area_px.mean())
    for name, (border, inside) in jumps(reading, block_borders(method.lengths(num_latents))).items():
        found[f"jump_{name}"] = [float(np.nanmean(x)) if np.isfinite(x).any() else None for x in (border, inside)]
    return found


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make and measure every video that `<out>/quality.jsonl` lacks; yields each new record."""
    from dualparal.engine.engine import Engine

    record_path = options.out / "quality.jsonl"
    done = {_key(r) for r in read_records(record_path)}
    prompts = held_out_prompts()
    prompts = [prompts[i] for i in np.random.default_rng(1).permutation(len(prompts))[: options.prompts]]
    methods = [m for m in all_methods().values() if not options.methods or m.name in options.methods]
    wanted = [(m, p, s) for p in prompts for s in range(options.seeds) for m in methods]
    settings = {"latents": options.latents_num, "steps": options.num_inference_steps}
    wanted = [
        (m, p, s) for m, p, s in wanted if _key({"method": asdict(m), "prompt": p.caption, "seed": s, **settings}) not in done
    ]
    if not wanted:
        return
    model, preset = find_asked(options)
    limits = Limits(seconds=25_000, num_per_block=1024)  # one pass over everything is a method too
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(
            model, preset=preset.model_copy(update={"limits": limits}), outputs=folder,
            **{**OF_A_BENCH, **given(EngineOptions, options)},
        ) as engine,
    ):  # fmt: skip
        for method, prompt, seed in wanted:
            start = time.monotonic()
            frames = make_frames(engine, method, prompt, seed, options)
            seconds = round(time.monotonic() - start, 2)
            record = {"method": asdict(method), "prompt": prompt.caption, "seed": seed, **settings, "seconds": seconds}
            record |= measure(frames, method, prompt)
            with record_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if seed == 0 and options.keep:
                np.savez_compressed(options.out / f"{method.name} - {prompt.caption}.npz", frames=frames)
            yield record


def _key(record: dict[str, Any]) -> str:
    method = {name: value for name, value in record["method"].items() if value is not None}  # older records lack new fields
    return json.dumps([method, *(record[k] for k in ("prompt", "seed", "latents", "steps"))], sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a run so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parser() -> argparse.ArgumentParser:
    flags = Parser(prog="dualparal bench quality", description="Measure the quality of every method.")
    add_model_flags(flags.add_argument_group("the model (default: pocket; or one trained on the same world)").add_argument)
    add_fields(flags.add_argument_group("the long videos").add_argument, GenerationRequest, LENGTH, defaults=LENGTH)
    add_fields(flags.add_argument_group("the engine").add_argument, EngineOptions, of("job"), defaults=OF_A_BENCH)
    flags.add_argument("--out", type=not_empty, default="quality", help="folder of records and report")
    flags.add_argument("--prompts", type=int, default=12, help="how many held-out prompts")
    flags.add_argument("--seeds", type=int, default=1, help="videos per prompt and method")
    flags.add_argument("--methods", nargs="*", choices=list(all_methods()), metavar="NAME", help="only these (default: all)")
    flags.add_argument("--against", default=AGAINST, metavar="NAME", help="the method that differences are taken from")
    flags.add_argument("--keep", action="store_true", help="also keep the frames of every prompt's first seed as .npz")
    flags.add_argument("--report_only", action="store_true", help="make nothing new, write the report again")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench and write `quality.md` and `quality.svg` beside the records."""
    options = parser().parse_args(argv, argparse.Namespace(**LENGTH))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out = expand(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        for record in run(options):
            log.info(
                "%6.1f s  %-28s %-60s all %.2f", record["seconds"], record["method"]["name"], record["prompt"], record["all"]
            )
    log.info("%s", write_report(read_records(options.out / "quality.jsonl"), options.out, options.against))
    return 0
