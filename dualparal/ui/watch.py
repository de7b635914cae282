"""Follows one job for one tab: new blocks into the live video, the board about once a second, the results at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from dualparal.ui import panels
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio

LOOK_EVERY_S = 0.2
TELL_EVERY_S = 0.9

# (video, board, result, stop button, idle panel); gr.skip() leaves a part as it is
Update = tuple[Any, Any, Any, Any, Any]


async def watch(studio: Studio, job_id: str, owner: str, root: str, is_current: Callable[[], bool]) -> AsyncIterator[Update]:
    """Yield what changes on the page until the job has ended or the tab watches something else.

    A job that has already ended is shown at once; a running one is played from its first block, however late the tab came.
    """
    found = studio.find(job_id, owner)
    if found.is_ended:
        yield _ended(found, studio, root)
        return
    stop = gr.update(visible=True, interactive=True, value="Stop")
    yield gr.update(value=None), panels.board(found, studio), "", stop, _hidden()
    played, told, waited_s = 0, "", 0.0
    while is_current():
        found = studio.find(job_id, owner)
        if played < len(found.blocks):  # one segment per update: that is how the playlist grows
            told = panels.board(found, studio)
            yield found.blocks[played], told, gr.skip(), gr.skip(), gr.skip()
            played += 1
            continue
        if found.is_ended:
            yield _ended(found, studio, root)
            return
        if waited_s >= TELL_EVERY_S:
            waited_s = 0.0
            now = panels.board(found, studio)
            if now != told:
                told = now
                yield gr.skip(), told, gr.skip(), gr.skip(), gr.skip()
        await asyncio.sleep(LOOK_EVERY_S)
        waited_s += LOOK_EVERY_S
    # Gradio sends a generator's last update once more when it ends, which would put the old job back on the board.
    yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()


def _ended(found: Snapshot, studio: Studio, root: str) -> Update:
    video = str(found.video) if found.video else None
    result = panels.result(found, root, studio.can_resume(found), studio.can_compare(found))
    return gr.update(value=video), panels.board(found, studio), result, gr.update(visible=False), _hidden()


def _hidden() -> Any:
    return gr.update(visible=False)
