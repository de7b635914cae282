"""Prompts as people write them: cleaned text, and a timeline of shots, as a list or as lines that begin with a duration.

    a market in the rain, hand-held camera          what the whole film shows; may be left out
    [8s] a woman opens a red umbrella               a shot of eight seconds
    [6s blend] she walks away between the stalls    the text changes over some blocks
    [4s cut] the umbrella lies in a puddle          a new scene

A shot's text goes on until the next such line. Knows no video and no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dualparal.errors import RequestError

MAX_PROMPT_CHARS = 4000  # of one text
MAX_SHOTS = 200
MAX_TIMELINE_BYTES = 48_000
TERMINAL_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])?")
Transition = Literal["switch", "blend", "cut"]
TRANSITIONS: tuple[Transition, ...] = get_args(Transition)
SHOT_LINE = re.compile(r"[ \t]*\[[ \t]*(\d[^\]\n]*)\][ \t]*(.*)")
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*s(?:\s+(.*))?", re.IGNORECASE)
HOW = "write [8s], [8s cut] or [8s blend] before a shot's text"


class Shot(BaseModel):
    """One shot of a film: its own text, its length as `seconds` or `latents_num`, and how it begins."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field("", strict=True, description="what the shot shows, besides what the whole film shows")
    seconds: float | None = Field(None, gt=0, le=25_000, description="length in seconds")
    latents_num: int | None = Field(None, ge=1, le=100_000, description="length in latent frames")
    transition: Transition = Field("switch", description="how it begins: switch (at once), blend (over some blocks), cut")

    @field_validator("seconds", "latents_num", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("true and false are not values of this field")
        return value

    @field_validator("prompt")
    @classmethod
    def _usable(cls, text: str) -> str:
        text = usable_text(text).strip()
        if any(SHOT_LINE.match(line) for line in text.split("\n")):
            raise ValueError("a line of it begins with a number in brackets, as shots do; make it a shot of its own")
        return text


def usable_text(text: str) -> str:
    """`text` without what cannot be printed. Raises ValueError for what is too long or no text."""
    if len(text) > MAX_PROMPT_CHARS:
        raise ValueError(f"{len(text)} characters are too many; the limit is {MAX_PROMPT_CHARS}, shorten it")
    if any("\ud800" <= ch <= "\udfff" for ch in text):
        raise ValueError("half a surrogate pair is not a character; type or paste the text again")
    return _printable(text)


def _printable(text: str) -> str:
    """`text` without what breaks logs and players: terminal escapes and white space that moves the cursor become a blank, as
    the tokenizer's cleaning makes them, other control characters go."""
    text = TERMINAL_ESCAPE.sub(" ", text.replace("\r\n", "\n"))
    text = "".join(" " if ch.isspace() and ch not in "\n\t" and (ord(ch) < 32 or ch == "\x85") else ch for ch in text)
    return "".join(ch for ch in text if ch in "\n\t" or (ord(ch) >= 32 and not 127 <= ord(ch) < 160))


def checked_shots(given: Any) -> tuple[Shot, ...]:
    """`given` shots, each a `Shot` or a mapping. Raises `RequestError` with a sentence that names the shot which is wrong."""
    if not isinstance(given, list | tuple) or not given:
        raise _refused("must be a list of one or more shots, each {prompt, seconds or latents_num, transition}")
    if len(given) > MAX_SHOTS:
        raise _refused(f"{len(given)} shots are too many; the limit is {MAX_SHOTS}, join some of them")
    shots = tuple(_shot(number, one) for number, one in enumerate(given, 1))
    for number, shot in enumerate(shots, 1):
        if shot.seconds is not None and shot.latents_num is not None:
            raise _refused(
                f"shot {number} has seconds and latents_num, which both give its length; give it one of seconds and latents_num"
            )
        if number < len(shots):  # the last of an endless film has none
            check_length(number, shot)
    check_size(sum(len(shot.prompt.encode()) for shot in shots))
    return shots


def check_length(number: int, shot: Shot) -> None:
    """Raise `RequestError` for a shot without one."""
    if shot.seconds is None and shot.latents_num is None:
        raise _refused(f"shot {number} has no length; give it one of seconds and latents_num")


def shot_from_here(prompt: Any, transition: Any = None) -> Shot:
    """What a film under way is steered to: a shot that has no length yet. Raises `RequestError`."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"prompt={shown(prompt)}: the prompt is empty; say what the film shows from here on", "prompt")
    try:
        return Shot(prompt=prompt, seconds=None, latents_num=None, transition=transition or "switch")
    except ValidationError as error:
        first = error.errors()[0]
        field, what = str(first["loc"][0]), first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise RequestError(f"{field}={shown(first['input'])}: {what}", field) from None


def _shot(number: int, given: Any) -> Shot:
    if isinstance(given, Shot):
        return given
    if not isinstance(given, dict):
        raise _refused(f"shot {number} is a {type(given).__name__}, not {{prompt, seconds or latents_num, transition}}")
    try:
        return Shot(**{str(name): value for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])[:60]
        if first["type"] == "extra_forbidden":
            raise _refused(f"shot {number} has a field {field!r}; a shot has {', '.join(Shot.model_fields)}") from None
        what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise _refused(f"shot {number}: {field}={shown(first['input'])}: {what}") from None


def check_size(num_bytes: int) -> None:
    """Raise `RequestError` for more text than a timeline may have."""
    if num_bytes > MAX_TIMELINE_BYTES:
        raise _refused(f"{num_bytes} bytes of text are too many; the limit of a timeline is {MAX_TIMELINE_BYTES}, shorten it")


def split_timeline(text: str) -> tuple[str, list[dict[str, Any]]]:
    """A prompt as it was written: what stands before the first shot, and the shots. Without shots it is left as it is.

    Raises `RequestError` for a line that begins with a number in brackets and is no shot.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(SHOT_LINE.match(line) for line in lines):
        return text, []
    check_size(len(text.encode(errors="replace")))
    before: list[str] = []
    shots: list[tuple[dict[str, Any], list[str]]] = []
    for line in lines:
        if (found := SHOT_LINE.match(line)) is not None:
            shots.append((_bracket(found[1], len(shots) + 1), [found[2]]))
        else:
            (shots[-1][1] if shots else before).append(line)
    return "\n".join(before).strip(), [{**shot, "prompt": "\n".join(words).strip()} for shot, words in shots]


def _bracket(content: str, number: int) -> dict[str, Any]:
    """What stands in a shot's brackets."""
    found = DURATION.fullmatch(content.strip())
    if found is None:
        raise _refused(f"shot {number} begins with {shown(f'[{content}]')}, which is no duration; {HOW}")
    words = (found[2] or "switch").lower().split()
    known = ", ".join(TRANSITIONS[:-1]) + f" or {TRANSITIONS[-1]}"
    if unknown := [word for word in words if word not in TRANSITIONS]:
        raise _refused(f"shot {number}: {shown(unknown[0])} is not known; after the duration there may be {known}")
    if len(words) > 1:
        raise _refused(f"shot {number} has {' and '.join(words)[:60]}; after the duration there may be one of {known}")
    return {"seconds": float(found[1]), "transition": words[0]}


def join_timeline(prompt: str, shots: Sequence[tuple[float, str, str]]) -> str:
    """The inverse of `split_timeline`; each shot as (seconds, transition, text)."""
    lines = [prompt] if prompt else []
    for seconds, transition, text in shots:
        word = "" if transition == "switch" else f" {transition}"
        lines.append(f"[{seconds:.9f}".rstrip("0").rstrip(".") + f"s{word}] {text}".rstrip())
    return "\n".join(lines)


def text_of_shot(prompt: str, shot: Shot) -> str:
    """All that a shot shows: what the whole film shows, and its own."""
    return " ".join(part for part in (prompt.strip(), shot.prompt) if part)


def shown(value: object) -> str:
    """A value as one short printable piece of a sentence."""
    try:
        text = repr(value)  # escapes whatever cannot be printed
    except ValueError:  # an integer of more than 4300 digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _refused(sentence: str) -> RequestError:
    return RequestError(f"shots: {sentence}", "shots")
