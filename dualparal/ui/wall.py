"""The wall: the takes of a request side by side, as rough as they are, in step; one is chosen, or all go on.

The page's script draws the pictures (wall.js); here stands what there is of each take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from dualparal.errors import DualParalError
from dualparal.jobs.notes import read_notes
from dualparal.method.rules import plan_of
from dualparal.ui import owners, panels, side_by_side
from dualparal.ui.looks import pictures
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.steering import QUIET, one_sentence
from dualparal.ui.studio import Studio
from dualparal.ui.words import safe

HERE = Path(__file__).parent
COUNTS = (1, 2, 4)


class Wall:
    """`html` shows the takes that the job on the stage belongs with; nothing where it is no take."""

    def __init__(self, studio: Studio, owner_of: Callable[[object, gr.Request | None], str], root: str) -> None:
        self._studio, self._owner_of, self._root = studio, owner_of, root

    def build(self, buttons_js: str) -> None:
        """Create the component in the current Gradio context; `buttons_js` makes events of its buttons."""
        self.html = gr.HTML(
            apply_default_css=False, elem_id="wall", js_on_load=buttons_js + (HERE / "wall.js").read_text(encoding="utf-8")
        )

    def wire(self, browser: Any, job_id: Any, follow: Callable[..., None], watch: Callable[..., str]) -> None:
        """`follow` follows the job whose id an event has set; `watch` finds the one that an event names."""
        follow(self.html.show(watch, [browser], job_id, **QUIET), is_new=False)
        follow(self.html.resume(self._go_on, [browser], job_id, **QUIET))
        follow(self.html.all(self._all, [browser, job_id], job_id, **QUIET))
        self.html.remove(self._drop, [browser, job_id], self.html, **QUIET)
        self.html.star(self._star, [browser, job_id], self.html, **QUIET)

    def render(self, owner: str, job_id: str) -> str:
        """The wall of the takes that `job_id` belongs with; '' where it is no take, or the only one left."""
        if not job_id:
            return ""
        try:
            takes = self._studio.takes(job_id, owner)
        except DualParalError:
            return ""
        if len(takes) < 2:
            return ""
        tiles = "".join(self._tile(take, take.job_id == job_id) for take in takes)
        num_resting = sum(take.is_resting for take in takes)
        every = ""
        if num_resting:
            every = f'<button type="button" data-do="all" data-id="{safe(job_id)}">All {num_resting} to the end</button>'
        return f'<section class="wall"><header><h3>Takes</h3>{side_by_side.chosen()}{every}</header><ol>{tiles}</ol></section>'

    def _tile(self, take: Snapshot, is_shown: bool) -> str:
        assert take.take is not None
        head, _ = panels.headline(take, self._studio)
        found = pictures(take, self._root)
        lengths = plan_of(take.request).lengths
        looks = [{"url": found[block], "pictures": lengths[block]} for block in sorted(found) if block < len(lengths)]
        name, job_id = f"take {take.take.number + 1}, seed {take.request.seed}", safe(take.job_id)
        go_on = (
            f'<button type="button" data-do="resume" data-id="{job_id}">Go on with this one</button>' if take.is_resting else ""
        )
        drop = f'<button type="button" data-do="remove" data-id="{job_id}">Drop</button>' if take.is_ended else ""
        is_starred = str(read_notes(take.folder).is_starred).lower()
        star = (
            f'<button type="button" class="star" data-do="star" data-id="{job_id}" aria-pressed="{is_starred}" '
            f'aria-label="star {name}">{"★" if is_starred == "true" else "☆"}</button>'
        )
        shown = ' aria-current="true"' if is_shown else ""
        return (
            f'<li{shown}><button type="button" class="look" data-do="show" data-id="{job_id}" aria-label="Show {name}" '
            f'data-looks="{safe(json.dumps(looks))}"><canvas></canvas></button>'
            f"<p><b>seed {take.request.seed}</b> {safe(head)}{star}</p><div>{go_on}{drop}{side_by_side.box(take)}</div></li>"
        )

    def _go_on(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        return self._resume([event.id], self._owner_of(token, request), owners.address_of(request))

    def _all(self, token: str, watched: str, request: gr.Request) -> str:
        owner = self._owner_of(token, request)
        try:
            resting = [take.job_id for take in self._studio.takes(watched, owner) if take.is_resting]
        except DualParalError as error:
            raise one_sentence(error) from None
        return self._resume(resting, owner, owners.address_of(request)) if resting else watched

    def _resume(self, job_ids: list[str], owner: str, address: str) -> str:
        try:
            gone_on = [self._studio.resume(job_id, owner, address).job_id for job_id in job_ids]
        except DualParalError as error:
            raise one_sentence(error) from None
        return gone_on[0]

    def _drop(self, token: str, watched: str, event: gr.EventData, request: gr.Request) -> str:
        return self._changed(self._studio.put_away, token, watched, event, request)

    def _star(self, token: str, watched: str, event: gr.EventData, request: gr.Request) -> str:
        return self._changed(self._studio.note, token, watched, event, request)

    def _changed(
        self, change: Callable[[Any, str], Any], token: str, watched: str, event: gr.EventData, request: gr.Request
    ) -> str:
        owner = self._owner_of(token, request)
        try:
            change(event.id, owner)
        except DualParalError as error:
            raise one_sentence(error) from None
        return self.render(owner, watched)
