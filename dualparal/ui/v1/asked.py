"""The body of `POST /v1/videos`, JSON or a form with a picture or a video, as the fields of a request.

OpenAI's names are `model`, `prompt`, `seconds`, `size` ("832x480") and `input_reference`; `preset` and all fields of
`GenerationRequest` may stand beside them. What they may be, the request says. A picture to begin with, or a video to go on
from, is put among the page's uploads, and is gone once the job has taken it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anyio import to_thread
from gradio.utils import get_upload_folder
from starlette.datastructures import UploadFile
from starlette.requests import Request

from dualparal.errors import RequestError
from dualparal.media.film import kind_of
from dualparal.request import shown
from dualparal.ui.api import FILES, VIDEO
from dualparal.ui.http.refusals import RETRY_S, Refusal
from dualparal.ui.v1.bodies import PICTURE, form_of, json_of

SIZE = re.compile(r"([0-9]{1,5})\s?[x×]\s?([0-9]{1,5})")
DATA = re.compile(r"data:image/[a-z.+-]{1,20};base64,(.*)", re.DOTALL)
MAX_AT_ONCE = 16  # forms that are being sent: each may hold a picture
_num_forms = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for: `fields` of a request, the `preset` or model that it names."""

    fields: Mapping[str, Any]
    preset: Any = None
    model: Any = None
    folder: Path | None = field(default=None, repr=False)  # of its picture

    def of_preset(self, name: Any) -> Asked:
        """The same of the preset called `name`."""
        return replace(self, preset=name, model=None)


@contextlib.asynccontextmanager
async def asked(request: Request) -> AsyncIterator[Asked]:
    """The body, read; afterwards its picture is gone. Raises `Refusal`."""
    global _num_forms
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/")
    if is_form and _num_forms >= MAX_AT_ONCE:
        raise Refusal(503, "many pictures are being sent here now; try again", "busy", headers={"Retry-After": RETRY_S})
    _num_forms += is_form
    found = None
    try:
        values = await form_of(request) if is_form else await json_of(request)
        found = await to_thread.run_sync(_asked, values)
        yield found
    finally:
        _num_forms -= is_form
        if is_form:
            await request.close()
        if found is not None and (folder := found.folder) is not None:
            await to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


def _asked(values: dict[str, Any]) -> Asked:
    """`values` in the request's own words; their picture on the disk."""
    for name in (*FILES, VIDEO):
        if name in values:
            raise Refusal(400, f"{name} is called {PICTURE} here", "invalid_value", param=name)
    size, picture = values.pop("size", None), values.pop(PICTURE, None)
    preset, model = values.pop("preset", None), values.pop("model", None)
    if size is not None:
        values |= _sizes(size, values)
    folder = None
    if picture is not None:
        folder = _kept(picture)
        values[VIDEO if _is_video(folder / "picture") else FILES[0]] = {"path": str(folder / "picture")}
    return Asked(fields=values, preset=preset, model=model, folder=folder)


def _sizes(size: Any, values: Mapping[str, Any]) -> dict[str, int]:
    match = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise Refusal(
            400, f"size={shown(size)} is none; write width x height in pixels, as 832x480", "invalid_value", param="size"
        )
    if "width" in values or "height" in values:
        raise Refusal(400, "size and width or height both give the size; give one of them", "invalid_value", param="size")
    return {"width": int(match[1]), "height": int(match[2])}


def _kept(picture: Any) -> Path:
    """A folder among the uploads with the picture: of a form's file, or of the text in JSON. Raises `Refusal`."""
    data = None if isinstance(picture, UploadFile) else _decoded(picture)
    folder = Path(get_upload_folder()) / f"v1-{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700, parents=True)
        with open(folder / "picture", "xb") as opened:
            if data is None:
                shutil.copyfileobj(picture.file, opened)
            else:
                opened.write(data)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Refusal(503, f"the picture could not be stored: {error.strerror}", "no_storage", param=PICTURE) from None
    return folder


def _is_video(file: Path) -> bool:
    try:
        kind_of(file)
    except RequestError:
        return False
    return True


def _decoded(picture: Any) -> bytes:
    text = picture.get("image_url") if isinstance(picture, dict) else picture
    match = DATA.fullmatch(text) if isinstance(text, str) else None
    with contextlib.suppress(binascii.Error, ValueError):
        if match is not None:
            return base64.b64decode(match[1], validate=True)
    raise Refusal(
        400, f"{PICTURE}: send the picture as a form's file, or as image_url a data:image/png;base64,... text; this server "
        "fetches no address and keeps no files", "invalid_value", param=PICTURE,
    )  # fmt: skip
