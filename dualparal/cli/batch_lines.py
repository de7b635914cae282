"""The lines of a batch: read, completed and checked as a whole, before the first video of them is begun.

A file ending in .jsonl (.ndjson, .json) has a JSON object a line, with the fields of a request and a `save_file` of its own, or
a text in quotes; any other file a prompt a line. Each line has a key of what it asks for, so that a batch that is started again
finds the videos it has made: a key depends on no other line, and not on where in the file it stands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.agreement import LENGTHS
from dualparal.engine.beginning import with_beginning
from dualparal.errors import DualParalError, RequestError
from dualparal.paths import is_file, why_missing
from dualparal.prompts import split_timeline
from dualparal.request import GenerationRequest, Settings, shown

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
MAX_TOLD = 20  # faults
EXAMPLE = '{"prompt": "a kite", "seconds": 8}'
KEY_CHARS = 16  # of a job's id, which has eleven of the time and a dash before them
Target = Callable[[int, str | None], Path | None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One video of a batch: the `number` of its line, what it is made with, its `key` and where its copy is put."""

    number: int
    settings: Settings
    key: str
    target: Path | None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not empty. Raises `RequestError` where the file cannot be read."""
    if not is_file(path):
        raise RequestError(f"batch: there is no file {path}{why_missing(path)}", "batch")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"batch: {path} is not UTF-8; save it as that", "batch") from None
    except OSError as error:
        raise RequestError(f"batch: {path} cannot be read: {error.strerror}", "batch") from None
    yield from ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def checked(engine: Engine, path: Path, defaults: Mapping[str, Any], target: Target) -> list[Line]:
    """All videos of the file, with `defaults` where a line says nothing itself; `target` gives a line's own copy its place.
    Raises one `RequestError` that names each line at fault and why."""
    found: list[Line] = []
    faults: list[str] = []
    seen: Counter[str] = Counter()
    targets: dict[Path, int] = {}
    is_json = path.suffix.lower() in JSON_ENDINGS
    for number, text in read_lines(path):
        try:
            own = _fields(text, is_json)
            place = target(number, own.pop("save_file", None))
            if place is not None and (before := targets.setdefault(place, number)) != number:
                raise RequestError(f"save_file={place} is that of line {before} too; give each its own", "save_file")
            request = GenerationRequest(**_together(defaults, own))
            if (request.takes or 1) > 1:
                raise RequestError("takes rest until one is chosen, which no batch does; write a line for each seed", "takes")
            if request.is_endless:
                raise RequestError("an endless film would never make room for the next one; leave is_endless out", "is_endless")
            settings = engine.resolve(request)
            if (refusal := engine.plan(settings, is_short=True).refusal) is not None:
                raise RequestError(refusal)
            asked = _asked(engine, request, settings)
            seen[asked] += 1
            key = hashlib.sha256(f"{asked}#{seen[asked]}".encode()).hexdigest()[:KEY_CHARS]
            found.append(Line(number=number, settings=settings, key=key, target=place))
        except DualParalError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        more = [f"and {len(faults) - MAX_TOLD} more"] if len(faults) > MAX_TOLD else []
        told = "\n  ".join([*faults[:MAX_TOLD], *more])
        raise RequestError(f"{path}: {len(faults)} of its lines cannot be made; nothing was started\n  {told}", "batch")
    if not found:
        raise RequestError(f"batch: {path} is empty; give a prompt a line", "batch")
    return found


def _fields(text: str, is_json: bool) -> dict[str, Any]:
    """What a line asks for."""
    try:
        value = json.loads(text) if is_json else text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is no JSON ({error}); write one object a line, as {EXAMPLE}", "batch") from None
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise RequestError(f"it is {shown(value)}; write an object with the fields of a request, as {EXAMPLE}", "batch")
    return dict(value)


def _together(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A line's own fields, and the others'; of all that give the length its own."""
    prompt = own.get("prompt")
    has_length = any(name in own for name in (*LENGTHS, "shots")) or (isinstance(prompt, str) and split_timeline(prompt)[1])
    return {name: value for name, value in defaults.items() if not (has_length and name in LENGTHS)} | dict(own)


def _asked(engine: Engine, request: GenerationRequest, settings: Settings) -> str:
    """What makes this video another than others: a seed that was left out does not, and of a picture what is in it."""
    picture = with_beginning(settings, engine.outputs, engine.checkpoint.latent_sizes)[0].start_image
    values = request.model_dump(exclude_none=True, exclude={"start_image"}) | ({"start_image": picture} if picture else {})
    made_with = {"model": settings.model, "preset": engine.preset.name, "dtype": engine.dtype, "changes": engine.changes()}
    return json.dumps([values, made_with], sort_keys=True, default=str)


def targets_in(folder: str | None, check: Callable[[str, str], Path | None]) -> Target:
    """Copies go into `folder` under the number of their line, or under a line's own name; without a folder only those with a
    name are made. `check(path, number)` makes sure that a file can be written there."""

    def target(number: int, own: Any) -> Path | None:
        if own is not None and (not isinstance(own, str) or not own):
            raise RequestError(f"save_file={shown(own)} is no name of a file", "save_file")
        if own is None and folder is None:
            return None
        place = Path(os.path.expanduser(folder or ""), os.path.expanduser(own or f"{number:04d}.mp4"))
        return check(str(place), f"{number:04d}")

    return target
