"""Files that visitors send: by the time a request names one it lies in the folder of uploads; only from there is it read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from dualparal.errors import RequestError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def uploaded(value: Any, field: str) -> str | None:
    """The path of an uploaded file: of what the page's component (a path) or an API call (a dictionary with one) has for it;
    None for none. Raises `RequestError` for what was not uploaded: nobody names files of this machine."""
    path = value.get("path") if isinstance(value, dict) else value
    if path is None:
        return None
    folder = Path(get_upload_folder()).resolve()
    if isinstance(path, str) and path and "\0" not in path and len(path) < 4096 and folder in Path(path).resolve().parents:
        return str(Path(path).resolve())
    raise RequestError(f"{field}: it has to be uploaded, as gradio_client's handle_file does it", field)
