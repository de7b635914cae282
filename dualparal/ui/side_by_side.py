"""Two to four finished videos side by side under one playhead, plain Wan's among them; two can be wiped from one to the other.

They are chosen by the boxes on their cards (buttons.js); the page's script plays them in step (side_by_side.js).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dualparal.errors import DualParalError, RequestError
from dualparal.jobs.notes import read_notes
from dualparal.ui.panels import file_url
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.steering import QUIET, one_sentence
from dualparal.ui.studio import Studio
from dualparal.ui.words import duration, length, safe, short

HERE = Path(__file__).parent
FEWEST, MOST = 2, 4
SMALL_PX = 128  # up to here pixels are shown as such
MAX_NAME_CHARS = 60


def box(found: Snapshot) -> str:
    """The box that chooses a video; '' where there is none to be shown."""
    if found.video is None:
        return ""
    name = safe(short(_name(found), MAX_NAME_CHARS))
    return (
        f'<label class="pick"><input type="checkbox" data-pick="{safe(found.job_id)}" '
        f'aria-label="Side by side: {name}, seed {found.request.seed}">Side by side</label>'
    )


def chosen() -> str:
    """What shows the chosen ones; the page's script makes it visible once there are enough, and counts them."""
    return (
        f'<span class="picked" data-fewest="{FEWEST}" data-most="{MOST}" role="status" hidden><b></b>'
        '<button type="button" data-do="side">Show side by side</button>'
        '<button type="button" data-do="unpick">None</button></span>'
    )


class SideBySide:
    """`html` shows the chosen videos; nothing until some are."""

    def __init__(self, studio: Studio, owner_of: Callable[[object, gr.Request | None], str], root: str) -> None:
        self._studio, self._owner_of, self._root = studio, owner_of, root

    def build(self) -> None:
        """Create the component in the current Gradio context."""
        script = (HERE / "side_by_side.js").read_text(encoding="utf-8")
        self.html = gr.HTML(apply_default_css=False, elem_id="side-by-side", js_on_load=script)

    def wire(self, browser: Any, *pickers: gr.HTML) -> None:
        """`pickers` have boxes and a button."""
        for picker in pickers:
            picker.side(self._show, [browser], self.html, **QUIET)
        self.html.close(lambda: "", None, self.html, queue=False, **QUIET)

    def render(self, owner: str, job_ids: Sequence[str]) -> str:
        """The videos `job_ids` of `owner`, in this order. Raises `RequestError` unless they are two to four different ones that
        are there."""
        if not FEWEST <= len(job_ids) <= MOST or len(set(job_ids)) < len(job_ids):
            raise RequestError(f"{len(set(job_ids))} videos are chosen; two to four can be shown side by side", "job_id")
        shown = [self._studio.find(job_id, owner) for job_id in job_ids]
        if missing := next((found for found in shown if found.video is None), None):
            raise RequestError(f"job {missing.job_id} has no video", "job_id")
        first = shown[0].request
        wipe = at = ""
        if len(shown) == FEWEST:
            wipe = '<label><input type="checkbox" class="wipe"> Wipe</label>'
            at = (
                '<label class="wipe-at">Wipe <input type="range" min="0" max="100" value="50" '
                'aria-label="where the first video ends and the second begins, in percent of the width"></label>'
            )
        kind = "wall side-by-side small" if first.width <= SMALL_PX else "wall side-by-side"
        return (
            f'<section class="{kind}" aria-label="videos side by side" style="--ratio:{first.width / first.height:.4f}">'
            f'<header><h3>Side by side</h3><span>{wipe}<label><input type="checkbox" class="loop" checked> Loop</label>'
            f'<button type="button" class="close">Close</button></span></header>'
            f'<ol class="pictures">{"".join(self._tile(found) for found in shown)}</ol>{at}'
            '<div class="playhead"><button type="button" class="play">Play</button>'
            f'<input type="range" class="place" min="0" max="1" value="0" step="{1 / first.fps:.5f}" '
            'aria-label="place in the videos, in seconds"><output>0.0 s</output></div></section>'
        )

    def _tile(self, found: Snapshot) -> str:
        assert found.video is not None
        request = found.request
        facts = [f"seed {request.seed}", length(found.num_frames, request.fps)]
        if found.is_baseline:
            facts.insert(0, '<em class="plain">plain Wan</em>')
        if found.made_in_s:
            facts.append(f"made in {duration(found.made_in_s)}")
        url, name = safe(file_url(found.video, self._root)), safe(short(_name(found), MAX_NAME_CHARS))
        return (
            f'<li><div class="frame"><video src="{url}" muted playsinline preload="auto" tabindex="-1"></video></div>'
            f'<p title="{safe(request.all_text)}"><b>{name}</b> {" · ".join(facts)}</p></li>'
        )

    def _show(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        try:
            return self.render(self._owner_of(token, request), str(event.id).split(",")[: MOST + 1])
        except DualParalError as error:
            raise one_sentence(error) from None


def _name(found: Snapshot) -> str:
    return read_notes(found.folder).name or found.request.all_text or "no prompt"
