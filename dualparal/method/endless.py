"""Endless films: a plan that reaches some blocks ahead and is made longer in time, and the end that somebody asks for
(METHOD.md, "Prompts over time").

Whatever is planned ahead, a film that was wrapped up is cut into the blocks of one that was submitted with that length: what
lies ahead of a shot's beginning are whole blocks only. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualparal.method.plan import BlockPlan
from dualparal.method.rules import plan_of
from dualparal.prompts import Shot
from dualparal.request import MAX_LATENTS, Settings

BLOCKS_AHEAD = 32  # planned at first; later a quarter of what there is, if that is more


def first_horizon(shots: Sequence[Shot], num_per_block: int, num_cat: int, *, is_continued: bool, has_picture: bool) -> int:
    """Latents that the last shot, or a film without shots, is planned to have."""
    is_first = len(shots) <= 1
    if is_first and (is_continued or has_picture):
        head = int(has_picture)
    else:
        head = num_cat if is_first or shots[-1].transition == "cut" else 0  # a scene's first block is longer
    return head + BLOCKS_AHEAD * num_per_block


def extended(settings: Settings, plan: BlockPlan) -> Settings:
    """`settings`, whose block plan is `plan`, with more blocks at its end; where a film may have no more, it is wrapped up."""
    more = max(BLOCKS_AHEAD, plan.num_blocks // 4) * settings.num_per_block
    if settings.latents_num + more > MAX_LATENTS:
        return wrapped_up(settings, plan, plan.num_blocks)
    shots = settings.shots
    if shots:
        last = shots[-1].model_copy(update={"latents_num": (shots[-1].latents_num or 0) + more})
        shots = (*shots[:-1], last)
    return Settings(**{**dict(settings), "latents_num": settings.latents_num + more, "shots": shots})


def wrapped_up(settings: Settings, plan: BlockPlan, block: int) -> Settings:
    """`settings`, whose block plan is `plan`, ending with the block before `block`, or the first after it where a film can end
    that is cut like this one."""
    for count in range(max(1, block), plan.num_blocks + 1):
        found = _ending_after(settings, plan, count)
        if plan_of(found).lengths == plan.lengths[:count]:
            return found
    raise AssertionError("an endless film's last shot is made of whole blocks")


def _ending_after(settings: Settings, plan: BlockPlan, count: int) -> Settings:
    end = plan.num_shown + plan.start(count)
    shots: list[Shot] = []
    begin = 0
    for shot in settings.shots or ():
        assert shot.latents_num is not None
        if begin < end:
            shots.append(shot.model_copy(update={"latents_num": min(shot.latents_num, end - begin)}))
        begin += shot.latents_num
    return Settings(**{**dict(settings), "latents_num": end, "shots": tuple(shots) or None, "is_endless": False})
