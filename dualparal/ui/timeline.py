"""A film's timeline on the page: its shots over the strip of blocks, while one types and while it is made.

The controls that write the lines into the prompt are `timeline.js`; what a line means is `dualparal.prompts` alone.
"""

from __future__ import annotations

from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of
from dualparal.method.timeline import scenes_of
from dualparal.prompts import TRANSITIONS
from dualparal.request import TEMPORAL_FACTOR, Settings
from dualparal.ui.words import safe, short

BEGINS = {"switch": "the text changes", "blend": "the text changes over three blocks", "cut": "a cut: a new scene"}
ENDLESS_BLOCKS = 4  # of its last shot are shown before it is made
EDITOR = (
    '<div class="shots-editor" data-transitions="{words}"><ol></ol>'
    '<button type="button" class="add-shot" title="a part of the film with its own text and length">+ Add a shot</button>'
    "</div>"
).format(words=",".join(TRANSITIONS))  # fmt: skip


def preview(settings: Settings) -> str:
    """Under the prompt: shots with their seconds over the blocks that they become; '' without shots."""
    if not settings.shots:
        return ""
    plan = plan_of(settings)
    num_blocks = _blocks_before_the_last_shot(settings) + ENDLESS_BLOCKS if settings.is_endless else None
    blocks = "".join(
        f'<i class="{"cut" if block in plan.cuts else ""}" style="flex-grow:{frames}"></i>'
        for block, frames in enumerate(_frames_of_blocks(plan)[:num_blocks])
    )
    total = f"{settings.num_frames / settings.fps:.1f} s"
    summary, end = f"{len(settings.shots)} shot{'s' * (len(settings.shots) != 1)}, {plan.num_blocks} blocks, {total}", total
    if settings.is_endless:
        summary, end = f"{len(settings.shots)} shot{'s' * (len(settings.shots) != 1)}, the last goes on without an end", "…"
    return (
        f'<section class="film" role="img" aria-label="{summary}">{shots_row(settings, num_blocks)}'
        f'<div class="film-blocks">{blocks}</div>'
        f'<div class="film-scale"><span>0 s</span><span>{summary}</span><span>{end}</span></div></section>'
    )


def shots_row(settings: Settings, num_blocks: int | None = None) -> str:
    """The shots, as wide as each is long, in the first `num_blocks` (None: all); '' without."""
    if not settings.shots:
        return ""
    cells, first, number = [], 0, 0
    end = sum(_frames_of_blocks(plan_of(settings))[:num_blocks])
    goes_on = settings.continue_from is not None
    for scene in scenes_of(settings.shots):
        for place, latents in enumerate(scene):
            shot, number = settings.shots[number], number + 1
            begins_scene = place == 0 and not (goes_on and number == 1)
            num_frames = TEMPORAL_FACTOR * latents - (TEMPORAL_FACTOR - 1) * begins_scene
            num_frames = min(num_frames, end - first) if num_blocks is not None else num_frames
            if num_frames <= 0:
                break
            how = "the film begins" if number == 1 else BEGINS[shot.transition]
            from_s, to_s = first / settings.fps, (first + num_frames) / settings.fps
            text = short(shot.prompt, 120) or "what the whole film shows"
            title = f"shot {number}, {from_s:.1f} to {to_s:.1f} s, {how}: {text}"
            kind = "first" if number == 1 else shot.transition
            lasts = "…" if settings.is_endless and number == len(settings.shots) else f"{to_s - from_s:.1f} s"
            cells.append(
                f'<span class="shot {kind}" style="flex-grow:{num_frames}" title="{safe(title)}">'
                f"<b>{number}</b><em>{lasts}</em><span>{safe(short(shot.prompt, 40))}</span></span>"
            )
            first += num_frames
    return f'<div class="film-shots">{"".join(cells)}</div>'


def _blocks_before_the_last_shot(settings: Settings) -> int:
    before = TEMPORAL_FACTOR * sum(shot.latents_num or 0 for shot in (settings.shots or ())[:-1])
    total = 0
    for block, frames in enumerate(_frames_of_blocks(plan_of(settings))):
        if total >= before:
            return block
        total += frames
    return 0


def _frames_of_blocks(plan: BlockPlan) -> list[int]:
    return [plan.num_frames_of(block) for block in range(plan.num_blocks)]
