"""Other files of a finished video, made when they are asked for and gone again a while later."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from dualparal.errors import DualParalError, RequestError
from dualparal.media.exports import frames_zip, without_settings
from dualparal.ui.panels import file_url, name_of
from dualparal.ui.steering import QUIET, one_sentence
from dualparal.ui.studio import Studio

KEEP_S = 900.0
FETCH_JS = """(url) => {
  if (url) Object.assign(document.createElement('a'), {href: url, download: ''}).click();
}"""


class Exports:
    """Makes them in the job's own folder, from which the browser fetches them."""

    def __init__(self, studio: Studio, owner_of: Callable[[object, gr.Request | None], str], root: str) -> None:
        self._studio, self._owner_of, self._root = studio, owner_of, root
        self._lock = threading.Lock()  # one at a time: taking a video apart is work

    def build(self) -> None:
        self._url = gr.Textbox(visible="hidden", elem_id="export-url")

    def wire(self, browser: gr.BrowserState, result: gr.HTML) -> None:
        """`result` has the buttons."""
        for event, make in ((result.frames, self.frames), (result.plain, self.plain)):
            event(make, [browser], self._url, concurrency_limit=2, **QUIET).success(
                None, [self._url], None, js=FETCH_JS, **QUIET
            )

    def frames(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        """The address of all frames of a video as PNGs in a zip."""
        return self._made(event.id, self._owner_of(token, request), "-frames.zip", frames_zip)

    def plain(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        """The address of a copy that does not tell what was asked for."""
        return self._made(event.id, self._owner_of(token, request), "-plain.mp4", without_settings)

    def _made(self, job_id: object, owner: str, ending: str, make: Callable[[Path, Path], Path]) -> str:
        try:
            found = self._studio.find(job_id, owner)
            if found.video is None:
                raise RequestError(f"job {found.job_id} has no video", "job_id")
            target = found.folder.path / f"{name_of(found)}{ending}"
            with self._lock:
                make(found.video, target)
        except DualParalError as error:
            raise one_sentence(error) from None
        timer = threading.Timer(KEEP_S, _remove, [target])
        timer.daemon = True
        timer.start()
        return file_url(target, self._root)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
