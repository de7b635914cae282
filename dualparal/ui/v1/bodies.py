"""A body below `/v1` as names and values: JSON, or a form as curl and OpenAI's client send it.

In a form all values are texts, and a list is one JSON text or, as OpenAI's client writes it, `loras[]` once for each entry and
`shots[][prompt]`, `shots[][seconds]` once for each shot.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, get_args, get_origin

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from dualparal.request import GenerationRequest, shown
from dualparal.ui.http.bodies import MAX_CALL_BYTES
from dualparal.ui.http.refusals import Refusal

PICTURE = "input_reference"
MAX_FIELDS = 512
LISTS = tuple(
    name
    for name, info in GenerationRequest.model_fields.items()
    if any(get_origin(kind) in (tuple, list) for kind in (info.annotation, *get_args(info.annotation)))
)
IN_LIST = re.compile(rf"({'|'.join(LISTS)})\[\](?:\[(\w{{1,40}})\])?")


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises `Refusal`."""
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(400, 'the body is not JSON; send an object such as {"prompt": "a kite"}', "invalid_json") from None
    if not isinstance(values, dict):
        raise Refusal(400, f'the body is {shown(values)} and no object; send {{"prompt": "a kite"}}', "invalid_json")
    return values


async def form_of(request: Request) -> dict[str, Any]:
    """The values of a form; of its file, if there is one, the upload. Raises `Refusal`."""
    try:
        form: FormData = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_CALL_BYTES)
    except HTTPException as error:
        raise Refusal(400, f"the form cannot be read: {error.detail}", "invalid_form") from None
    values: dict[str, Any] = {}
    lists: dict[str, dict[str, list[str]]] = {}
    num_chars = 0
    for name, value in form.multi_items():
        num_chars += len(name) + len(value if isinstance(value, str) else "")
        if num_chars > MAX_CALL_BYTES:
            raise Refusal(413, f"the form has more than the {MAX_CALL_BYTES:,} characters it may have", "too_large")
        if isinstance(value, UploadFile):
            if name != PICTURE:
                raise _refused(f"{shown(name)} is a file; the only one there may be is {PICTURE}", PICTURE)
        elif (match := IN_LIST.fullmatch(name)) is not None:
            lists.setdefault(match[1], {}).setdefault(match[2] or "", []).append(value)
            continue
        if name in values:
            raise _refused(f"{shown(name)} is there twice; give it once", name[:60])
        values[name] = _json_or_text(value) if name in LISTS and isinstance(value, str) else value
    for name, columns in lists.items():
        if name in values:
            raise _refused(f"{name} and {name}[] are both there; give one of them", name)
        values[name] = _list_of(name, columns)
    return values


def _list_of(name: str, columns: dict[str, list[str]]) -> list[Any]:
    """Entries from what a form has of each of their fields, which is sorted by field: whose it is can be told only where all
    of them have it."""
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1 or ("" in columns and len(columns) > 1):
        raise _refused(f"it cannot be told which of {name} has which field; give all of them the same, or one JSON text", name)
    if "" in columns:
        return list(columns[""])
    return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]


def _refused(sentence: str, param: str) -> Refusal:
    return Refusal(400, sentence, "invalid_form", param=param)


def _json_or_text(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text
