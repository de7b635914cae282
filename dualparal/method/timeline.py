"""Prompts over time: where shots begin, which text each block listens to, and which texts are at hand (METHOD.md, "Prompts over
time").

Pure: knows neither embeddings nor ranks. A text is a number: first the texts that are encoded, then mixtures of two others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dualparal.errors import RequestError
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Item
from dualparal.prompts import Shot, join_timeline, text_of_shot
from dualparal.request import MAX_LATENTS, TEMPORAL_FACTOR, Settings

BLEND_BLOCKS = 3  # of a shot, over which its text comes


# Where shots begin


def border_at(seconds: float, fps: int, *, is_continued: bool = False) -> int:
    """The latent frame that a scene's border after `seconds` lies at; `is_continued`: the scene began in a film before."""
    return round(seconds * fps / TEMPORAL_FACTOR) if is_continued else 1 + round((seconds * fps - 1) / TEMPORAL_FACTOR)


def settle_shots(shots: Sequence[Shot], fps: int, *, is_continued: bool = False) -> tuple[Shot, ...]:
    """`shots` with their lengths in latents; the first may continue another film. Raises `RequestError` for a shot too short
    for one, and for too long a film."""
    found: list[Shot] = []
    total = border = 0  # latents of the film, and of the scene, so far
    at_s = 0.0  # of the scene
    for number, shot in enumerate(shots, 1):
        if shot.transition == "cut" and number > 1:
            border, at_s, is_continued = 0, 0.0, False
        if shot.latents_num is not None:
            length = shot.latents_num
            at_s = _end_s(border + length, fps, is_continued)
        else:
            assert shot.seconds is not None
            at_s += shot.seconds
            length = border_at(at_s, fps, is_continued=is_continued) - border
        if length < 1:
            raise RequestError(
                f"shots: shot {number} is too short: {shot.seconds:g} s are less than one latent frame "
                f"({TEMPORAL_FACTOR / fps:.3g} s at {fps} fps); make it longer",
                "shots",
            )
        border, total = border + length, total + length
        if total > MAX_LATENTS:
            raise RequestError(
                f"shots: up to shot {number} the film has {total} latent frames; the limit is {MAX_LATENTS}, make it shorter",
                "shots",
            )
        found.append(shot.model_copy(update={"latents_num": length, "seconds": None}))
    return tuple(found)


def _end_s(border: int, fps: int, is_continued: bool) -> float:
    """Seconds that so many latents of a scene last."""
    return (TEMPORAL_FACTOR * border - (0 if is_continued else TEMPORAL_FACTOR - 1)) / fps


def written(settings: Settings) -> str:
    """The prompt as people write it, with a line for each shot; its seconds are the roundest that give its latents."""
    shots: list[tuple[float, str, str]] = []
    border, at_s, goes_on = 0, 0.0, settings.continue_from is not None
    for number, shot in enumerate(settings.shots or ()):
        if shot.transition == "cut" and number:
            border, at_s, goes_on = 0, 0.0, False
        assert shot.latents_num is not None
        border += shot.latents_num
        exact = _end_s(border, settings.fps, goes_on) - at_s
        seconds = next(
            s for s in _rounder(exact) if s > 0 and border_at(at_s + s, settings.fps, is_continued=goes_on) == border
        )
        at_s += seconds
        shots.append((seconds, shot.transition, shot.prompt))
    return join_timeline(settings.prompt, shots) if shots else settings.prompt


def _rounder(exact: float) -> Iterable[float]:
    yield from (round(exact / step) * step for step in (1, 0.5))
    yield from (round(exact, digits) for digits in range(1, 10))


def scenes_of(shots: Sequence[Shot]) -> list[list[int]]:
    """Latents of the shots of each scene. The film's first shot begins one, whatever it says."""
    scenes: list[list[int]] = []
    for shot in shots:
        assert shot.latents_num is not None
        if not scenes or shot.transition == "cut":
            scenes.append([])
        scenes[-1].append(shot.latents_num)
    return scenes


def steered(settings: Settings, plan: BlockPlan, block: int, shot: Shot) -> Settings:
    """`settings`, whose block plan is `plan`, with `shot` from `block` on, in place of all that was to come; the film keeps its
    length in latents, an endless one about as many as it was planned to have.

    A border that was to be a cut stays one: what a block across it would see has not been kept. Raises `RequestError` for a
    timeline that has become too large.
    """
    border, end = plan.start(block) + plan.num_shown if block else 0, 0
    whole = Shot(prompt=settings.prompt, seconds=None, latents_num=settings.latents_num, transition="switch")
    shots: list[Shot] = []
    for old in settings.shots or (whole,):
        assert old.latents_num is not None
        if end < border:
            shots.append(old.model_copy(update={"latents_num": min(old.latents_num, border - end)}))
        end += old.latents_num
    how = "cut" if block in plan.cuts else shot.transition
    length = settings.latents_num - border
    if settings.is_endless:  # whole blocks, so that it can be made longer
        begins = settings.num_cat if how == "cut" else 0
        head = begins if block else plan.num_shown or (0 if plan.ghost else settings.num_cat)
        length = head + max(1, (length - head) // settings.num_per_block) * settings.num_per_block
    new = shot.model_copy(update={"latents_num": length, "transition": how})
    prompt = settings.prompt if settings.shots else ""
    return Settings(**{**dict(settings), "latents_num": border + length, "prompt": prompt, "shots": (*shots, new)})


# What blocks listen to


@dataclass(frozen=True)
class Mixture:
    """(1 - share) of the text `old` and `share` of the text `new`."""

    old: int
    new: int
    share: float


@dataclass(frozen=True)
class TextPlan:
    """Block b listens to text `of_block[b]`: one of the `encoded` texts, or, numbered after them, of the `mixtures`."""

    encoded: tuple[str, ...]
    mixtures: tuple[Mixture, ...]
    of_block: tuple[int, ...]


def text_plan(request: Settings, plan: BlockPlan) -> TextPlan:
    """What each block of `plan`, the block plan of `request`, listens to."""
    if not request.shots:
        return TextPlan((request.prompt,), (), (0,) * plan.num_blocks)
    encoded = list(dict.fromkeys(text_of_shot(request.prompt, shot) for shot in request.shots))
    mixtures: list[Mixture] = []
    of_block: list[int] = []
    end = -plan.num_shown
    for shot in request.shots:
        assert shot.latents_num is not None
        end += shot.latents_num
        new = encoded.index(text_of_shot(request.prompt, shot))
        old = of_block[-1] if of_block and shot.transition == "blend" else new
        for number in range(_num_blocks(plan, len(of_block), end)):
            if old == new or number >= BLEND_BLOCKS:
                of_block.append(new)
            else:
                mixtures.append(Mixture(old, new, (number + 0.5) / BLEND_BLOCKS))
                of_block.append(len(encoded) + len(mixtures) - 1)
    return TextPlan(tuple(encoded), tuple(mixtures), tuple(of_block))


def _num_blocks(plan: BlockPlan, first: int, end: int) -> int:
    """Blocks from `first` on that lie before latent `end`."""
    at, block = plan.start(first), first
    while at < end:
        at, block = at + plan.lengths[block], block + 1
    assert at == end, "a shot begins at a block's border"
    return block - first


def most_texts(of_block: Sequence[int], num_in_flight: int) -> int:
    """Most different texts that `num_in_flight` blocks next to each other listen to."""
    ends = range(min(num_in_flight, len(of_block)), len(of_block) + 1)
    return max(len(set(of_block[max(0, end - num_in_flight) : end])) for end in ends)


class TextsAtHand:
    """Which texts are at hand while a schedule is walked: those that blocks in flight listen to.

    Every rank of a ring walks the same items from the same one on, so all agree on what comes when.
    """

    def __init__(self, of_block: Sequence[int], last: Mapping[int, int]) -> None:
        """`last`: index of each block's last item (`Schedule.last_on_ring`)."""
        self._of_block, self._last = of_block, last
        self._listeners: dict[int, set[int]] = {}

    def comes(self, item: Item) -> int | None:
        """The text that has to be there from `item` on and was not; None when there is none. To be asked once, in order."""
        text = self._of_block[item.block]
        is_new = text not in self._listeners
        self._listeners.setdefault(text, set()).add(item.block)
        return text if is_new else None

    def goes(self, item: Item) -> int | None:
        """The text that no block in flight listens to after `item`; None when there is none. To be asked after `comes`."""
        text = self._of_block[item.block]
        if item.index != self._last[item.block]:
            return None
        self._listeners[text].discard(item.block)
        if self._listeners[text]:
            return None
        del self._listeners[text]
        return text
