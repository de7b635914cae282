"""What a request's values have to agree on with each other; what each may be by itself its field says (`dualparal.request`).

The same for requests, which may leave values out (None), and for settings, which are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualparal.errors import RequestError
from dualparal.prompts import check_length, shown, text_of_shot

TEMPORAL_FACTOR = 4  # frames folded into one latent frame by the Wan VAE (the first latent holds one frame)
LENGTHS = ("latents_num", "num_frames", "seconds")  # a request gives at most one of them


def check_together(found: Any) -> None:
    """Raise `RequestError` when values that are given do not fit each other."""
    _check_said(found)
    given = [name for name in LENGTHS if name in type(found).model_fields and getattr(found, name) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} both give the length; give one of them", given[1])
    if found.is_endless and _is_request(found) and given:
        raise RequestError(f"is_endless: an endless film has no length; leave {given[0]} out", given[0])
    if found.shots is not None:
        if not found.is_endless:
            check_length(len(found.shots), found.shots[-1])
        _check_shots(found, given)
    _check_num_frames(found)
    if found.start_image is not None:
        _check_start(found)
    if found.continue_from is not None:
        _check_continued(found)
    elif found.join:
        raise RequestError("join: there is no film to join; say with continue_from which one is continued", "join")
    per_block, num_cat = found.num_per_block, found.num_cat
    if per_block is not None and num_cat is not None and num_cat > per_block:
        raise RequestError(
            f"num_cat={num_cat} (the context) is more than num_per_block={per_block} (a block's latent frames); "
            f"use num_cat between 0 and {per_block}",
            "num_cat",
        )
    start, stop = found.guidance_start, found.guidance_stop
    if start is not None and stop is not None and start > stop:
        raise RequestError(
            f"guidance_start={start:g} is after guidance_stop={stop:g}; use guidance_start between 0 and {stop:g}",
            "guidance_start",
        )


def _check_said(found: Any) -> None:
    """Raise `RequestError` for a request, or a shot of it, that says nothing."""
    if found.shots is None and _is_request(found) and not found.prompt.strip():
        raise RequestError(f"prompt={shown(found.prompt)}: the prompt is empty; say what the video should show", "prompt")
    for number, shot in enumerate(found.shots or (), 1):
        if not text_of_shot(found.prompt, shot):
            raise RequestError(
                f"shots: shot {number} says nothing, and neither does the film's prompt; say what it shows", "shots"
            )


def _check_shots(found: Any, given: Sequence[str]) -> None:
    """Raise `RequestError` for shots that do not agree with the length: of a request there is none besides, and those of
    settings are in latents."""
    if _is_request(found):
        if given:
            raise RequestError(f"{given[0]} and the shots both give the length; leave {given[0]} out", given[0])
    elif [shot.seconds for shot in found.shots] != [None] * len(found.shots) or found.latents_num != sum(
        shot.latents_num for shot in found.shots
    ):
        raise RequestError(f"shots: they are not the {found.latents_num} latents of the film", "shots")


def _check_start(found: Any) -> None:
    """Raise `RequestError` for a picture with nothing after it, or that nobody would see."""
    if found.num_cat == 0:
        raise RequestError("start_image: with num_cat=0 no block would see the picture; use at least 1", "start_image")
    first = found.shots[0].latents_num if found.shots else found.latents_num
    if first == 1 or (not found.shots and getattr(found, "num_frames", None) == 1):
        what = "the first shot" if found.shots else "the film"
        raise RequestError(
            f"start_image: the picture is the first of {what}'s latent frames, and there is no other; make it longer",
            "start_image",
        )


def _check_continued(found: Any) -> None:
    """Raise `RequestError` for a film that has two beginnings, or whose continuation would not see it."""
    if found.start_image is not None:
        raise RequestError(
            "continue_from and start_image both say what the film begins with; give one of them", "continue_from"
        )
    if found.num_cat == 0:
        raise RequestError(
            "continue_from: with num_cat=0 no block would see the film that is continued; use at least 1", "continue_from"
        )


def _check_num_frames(found: Any) -> None:
    """Raise `RequestError` for frames that are not whole latents; of settings latents are the measure."""
    if not _is_request(found) or (num_frames := found.num_frames) is None:
        return
    more = 0 if found.continue_from is not None else 1  # a film's first latent frame holds one
    if num_frames % TEMPORAL_FACTOR != more:
        low = (num_frames - more) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + more
        way_out = f"use {low} or {low + TEMPORAL_FACTOR}" if low > 0 else f"use {low + TEMPORAL_FACTOR}"
        raise RequestError(f"num_frames={shown(num_frames)}: must be 4k{' + 1' * more}; {way_out}", "num_frames")


def _is_request(found: Any) -> bool:
    """Of settings every length is known in latents."""
    return "seconds" in type(found).model_fields
