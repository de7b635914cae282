"""A Gradio slider that hands on what was typed beside it, whatever it is, so that a sentence of ours can say what is wrong.

Gradio's own refuses an emptied box or a value out of range before our code sees it: what depends on it, as the estimate, stays
as it was. Follows gradio/components/slider.py.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from dualparal.ui.live_video import NoStub


class Slider(gr.Slider, metaclass=NoStub):
    """`GenerationRequest` checks its values, as those of every caller."""

    is_template = True  # use the Slider's own front end

    def get_block_name(self) -> str:
        return "slider"

    def preprocess(self, payload: Any) -> Any:
        """The value as it came: a number, or None for an empty box."""
        return payload
