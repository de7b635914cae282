"""Follows one job for one tab: new blocks into the live video, the board about once a second, the results at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from dualparal.ui import panels, throttle
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.steering import FINISH
from dualparal.ui.studio import Studio

LOOK_EVERY_S = 0.2
TELL_EVERY_S = 0.9

# (video, board, result, stop buttons, idle panel, steering, what it said, its end); gr.skip() leaves a part as it is
Update = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any]


async def watch(studio: Studio, job_id: str, owner: str, root: str, is_current: Callable[[], bool]) -> AsyncIterator[Update]:
    """Yield what changes on the page until the job has ended or the tab watches something else.

    A job that has already ended is shown at once; a running one is played from its first block, however late the tab came.
    """
    found = await look(studio, job_id, owner)
    if found.is_ended:
        yield await asyncio.to_thread(_ended, found, studio, root)
        return
    stop = gr.update(visible=True, interactive=True, value="Stop")
    another = gr.update(visible=True, value="Stop, try another seed")
    steering = gr.update(visible=not found.is_baseline)
    board = await asyncio.to_thread(panels.board, found, studio, root)
    finish = gr.update(visible=found.request.is_endless, value=FINISH)
    yield gr.update(value=None), board, "", stop, another, _hidden(), steering, "", finish
    played, shown, waited_s = 0, "", 0.0
    with throttle.follower() as pause_s:
        while is_current():
            found = await look(studio, job_id, owner)
            if played < len(found.blocks):  # one segment per update: that is how the playlist grows
                shown = await asyncio.to_thread(panels.board, found, studio, root)
                yield found.blocks[played], shown, *_same()
                played += 1
                continue
            if found.is_ended:
                yield await asyncio.to_thread(_ended, found, studio, root)
                return
            if waited_s >= max(TELL_EVERY_S, pause_s()):
                waited_s = 0.0
                now = await asyncio.to_thread(panels.board, found, studio, root)
                if now != shown:
                    shown = now
                    yield gr.skip(), shown, *_same()
            await asyncio.sleep(LOOK_EVERY_S)
            waited_s += LOOK_EVERY_S
    # Gradio sends a generator's last update once more when it ends, which would put the old job back on the board.
    yield gr.skip(), gr.skip(), *_same()


async def look(studio: Studio, job_id: str, owner: str) -> Snapshot:
    """`studio.find` for the event loop: what this engine works on comes from memory, anything else is read in a thread."""
    live = studio.live(job_id, owner)
    return live if live is not None else await asyncio.to_thread(studio.find, job_id, owner)


def _ended(found: Snapshot, studio: Studio, root: str) -> Update:
    video = str(found.video) if found.video else None
    result = panels.result(found, root, studio.can_resume(found), studio.can_compare(found))
    return (
        gr.update(value=video),
        panels.board(found, studio, root),
        result,
        _hidden(),
        _hidden(),
        _hidden(),
        _hidden(),
        "",
        _hidden(),
    )


def _same() -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    return gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()


def _hidden() -> Any:
    return gr.update(visible=False)
