"""The field below the live video that steers the film while it is made: "from here on"."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable
from typing import Any

import gradio as gr

from dualparal.errors import DualParalError
from dualparal.prompts import MAX_PROMPT_CHARS, TRANSITIONS
from dualparal.ui import panels
from dualparal.ui.studio import Studio
from dualparal.ui.words import without_paths

FINISH = "Finish the film"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def one_sentence(error: DualParalError) -> gr.Error:
    """The error as a message on the page. Escaped: Gradio shows messages as HTML, and they quote what was typed."""
    return gr.Error(html.escape(without_paths(error)), print_exception=False, title="That did not work")


class SteeringField:
    """`row` is shown while there is something to steer, `told` says what came of it."""

    def __init__(self, studio: Studio, owner_of: Callable[[object, gr.Request | None], str]) -> None:
        """`owner_of` a browser's token and its request."""
        self._studio, self._owner_of = studio, owner_of

    def build(self) -> None:
        """Create the components in the current Gradio context."""
        with gr.Row(elem_id="steer", visible=False) as self.row:
            self._text = gr.Textbox(
                show_label=False, placeholder="From here on: another prompt for all blocks that have not entered yet",
                max_length=MAX_PROMPT_CHARS, elem_id="steer-text", scale=6, container=False,
            )  # fmt: skip
            self._how = gr.Dropdown(
                TRANSITIONS, show_label=False, elem_id="steer-how", scale=1, min_width=100, container=False,
            )  # fmt: skip
            self._go = gr.Button("From here on", elem_id="steer-go", scale=1, min_width=120)
            self._finish = gr.Button(FINISH, elem_id="steer-finish", scale=1, min_width=120, visible=False)
        self.told = gr.HTML(apply_default_css=False, elem_id="steered")

    def wire(self, browser: Any, job_id: Any) -> None:
        """`browser` and `job_id` are the page's states."""
        gr.on(
            [self._go.click, self._text.submit], self.from_here_on,
            [browser, job_id, self._text, self._how], [self._text, self.told], concurrency_limit=8, **QUIET,
        )  # fmt: skip

        self._finish.click(self.wrap_up, [browser, job_id], self.told, concurrency_limit=8, **QUIET)

    @property
    def shown(self) -> list[Any]:
        """The row, what is said below it, and the button that only an endless film has."""
        return [self.row, self.told, self._finish]

    def note_played(self, job_id: str, played_s: object, owner: str) -> None:
        """A tab shows the job and has played so many seconds of it; less than none where it plays nothing."""
        if job_id and isinstance(played_s, int | float) and played_s >= 0:
            with contextlib.suppress(DualParalError):  # it may be gone
                self._studio.note_played(job_id, float(played_s), owner)

    def wrap_up(self, token: str, job_id: str, request: gr.Request) -> str:
        """What is said once an endless film has an end."""
        try:
            told = self._studio.finish(job_id, self._owner_of(token, request))
            found = self._studio.find(job_id, self._owner_of(token, request))
        except DualParalError as error:
            raise one_sentence(error) from None
        return panels.wrapped_up(told, found.request.fps)

    def from_here_on(self, token: str, job_id: str, text: str, how: str, request: gr.Request) -> tuple[str, str]:
        """What then stands in the field, and what is said below it."""
        try:
            told = self._studio.steer(job_id, text, how, self._owner_of(token, request))
        except DualParalError as error:
            raise one_sentence(error) from None
        return "", panels.steered(told)
