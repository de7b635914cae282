"""Which cards make a video with which model: the table of docs/models.md.

All of it is the planner's arithmetic, as `python -m dualparal plan` has it; nothing is run and no card is asked. For a minute
of video with each preset, one rank on each card and the codec on the last rank's: as it is where that fits, else with the
proposal that changes the video least. A card is left out where a smaller one does the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.common import table
from dualparal.planning.job_plan import JobPlan, plan_job, settle_text_encoder
from dualparal.planning.layer_split import split_layers
from dualparal.planning.placement import ModelSizes, Placement, Speed
from dualparal.planning.proposals import first_proposal
from dualparal.planning.room import settle
from dualparal.planning.sizes import PUBLISHED_MODELS
from dualparal.presets import USUAL, Preset, load_presets
from dualparal.request import GenerationRequest, latents_of_seconds

GIGABYTES = (16, 24, 48, 80)
CARDS = (1, 2, 4, 8)
HEAD = ("`--preset`", "cards", "GB each", "further flags", "order, context", "GB on the fullest rank", "10 s, min", "60 s, min",
        "first frames, min")  # fmt: skip


def planned(preset: Preset, cards: int, gigabytes: int) -> tuple[str, JobPlan] | None:
    """(flags, plan of a minute of video without times); None where nothing on these cards would do."""
    sizes = ModelSizes.published(preset.model)
    assert sizes is not None
    layers = tuple(len(stage) for stage in split_layers(sizes.config["num_layers"], cards))
    placement = Placement(
        layers=layers, dtype=preset.dtype, vae_dtype=preset.vae_dtype, codec_rank=cards - 1,
        bytes_per_device=gigabytes * 10**9, text_encoder="auto",
    )  # fmt: skip
    placement = settle_text_encoder(settle(USUAL, preset, sizes, placement), sizes, placement)
    request = settle(GenerationRequest(prompt="any", seconds=60, seed=0), preset, sizes, placement)
    plan = plan_job(request, sizes, placement, is_short=True)
    if plan.refusal is None:
        return "", plan
    found = first_proposal(request, sizes, placement)
    return None if found is None else (found.flags, found.plan)


def rows_of(preset: Preset, gigabytes: Sequence[int], cards: Sequence[int], flops_per_s: float) -> Iterator[list[str]]:
    """The table's rows of one preset."""
    sizes, speed = ModelSizes.published(preset.model), Speed(flops_per_s=flops_per_s)
    assert sizes is not None
    for count in cards:
        before: tuple[str, str] | None = None
        for size in gigabytes:
            if (found := planned(preset, count, size)) is None:
                continue
            flags, plan = found
            how = f"{plan.request.schedule}, {plan.request.context}"
            if (flags, how) == before:
                continue
            before = flags, how
            minute = plan_job(plan.request, sizes, replace(plan.placement), speed=speed)
            latents_num = latents_of_seconds(10, plan.request.fps)
            short = plan_job(plan.request.model_copy(update={"latents_num": latents_num}), sizes, plan.placement, speed=speed)
            assert minute.total_s and short.total_s and minute.first_frames_s
            yield [
                f"`{preset.name}`", str(count), str(size), f"`{flags}`" if flags else "", how,
                f"{plan.bytes_per_rank / 1e9:.1f}",
                *(f"{seconds / 60:.1f}" for seconds in (short.total_s, minute.total_s, minute.first_frames_s)),
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=200.0, help="10^12 FLOP/s that one card reaches in bf16")
    options = parser.parse_args()
    presets = [preset for preset in load_presets().values() if preset.model in PUBLISHED_MODELS and not preset.loras]
    rows = [row for preset in presets for row in rows_of(preset, GIGABYTES, CARDS, options.tflops * 1e12)]
    print(table(list(HEAD), rows))


if __name__ == "__main__":
    main()
