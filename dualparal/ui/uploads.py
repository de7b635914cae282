"""Files that visitors send: by the time a request names one it lies in the folder of uploads; only from there is it read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from dualparal.errors import RequestError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mov", ".webm")


def uploaded(value: Any, field: str) -> str | None:
    """The path of an uploaded file: of what the page's component (a path) or an API call (a dictionary with one) has for it;
    None for none. Raises `RequestError` for what was not uploaded: nobody names files of this machine."""
    path = value.get("path") if isinstance(value, dict) else value
    if path is None:
        return None
    if is_uploaded(path):
        return str(Path(path).resolve())
    raise RequestError(f"{field}: it has to be uploaded, as gradio_client's handle_file does it", field)


def is_uploaded(path: Any) -> bool:
    """Whether it is the path of a file in the folder of uploads, with all links followed."""
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or "\0" in path or len(path) >= 4096 or not os.path.isabs(path):
        return False
    return folder in Path(path).resolve().parents
