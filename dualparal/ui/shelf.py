"""The gallery on the page: its tools (search, filter), its cards' buttons, and what they bring about.

What a card looks like is gallery.py's affair; which of an owner's jobs are shown, `find` here says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dualparal.errors import DualParalError
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.notes import read_notes
from dualparal.ui import gallery, owners
from dualparal.ui.steering import QUIET, one_sentence
from dualparal.ui.studio import Studio

HERE = Path(__file__).parent
BUTTONS_JS = (HERE / "buttons.js").read_text(encoding="utf-8")
FILTERS = {"All": gallery.ALL, "Starred": gallery.STARRED, "Finished": gallery.FINISHED, "Not finished": gallery.UNFINISHED}
MAX_SEARCH_CHARS = 200
MAX_KNOWN = 20_000
# The address that carries the gallery, and nothing else, to another browser. What is after the # no server reads.
CARRY_JS = """(token) => {
  const link = `${location.origin}${location.pathname}#gallery=${encodeURIComponent(token)}`;
  const field = document.querySelector('#gallery .carried');
  field.hidden = false; field.value = link; field.select();
  navigator.clipboard?.writeText(link).catch(() => {});
}"""
# A gallery that a link has brought; the one of before can be had back.
CARRIED_JS = """
  const carried = /^#gallery=([\\w%.-]{16,300})$/.exec(location.hash);
  if (carried) {
    const token = decodeURIComponent(carried[1]);
    history.replaceState(null, '', location.pathname + location.search);
    if (browser && browser !== token) localStorage.setItem('dualparal-before', browser);
    browser = token;
    sessionStorage.removeItem('dualparal-job');
  }"""


@dataclass(frozen=True)
class _Known:
    """What of a job is searched, as it was at `stamp`."""

    stamp: tuple[int, int]
    text: str
    numbers: tuple[str, ...]  # its seed and id, which are looked for whole
    state: str
    is_starred: bool

    def has(self, words: list[str]) -> bool:
        return all(word in self.text or word in self.numbers for word in words)


class Shelf:
    """`html` shows a page of the gallery; `query` is what the tools say: [page, search, filter]."""

    def __init__(self, studio: Studio, owner_of: Callable[[object, gr.Request | None], str], root: str) -> None:
        self._studio, self._owner_of, self._root = studio, owner_of, root
        self._known: dict[str, _Known] = {}

    def build(self) -> None:
        """Create the components in the current Gradio context."""
        self.page = gr.State(0)
        self.seen = gr.State(0)  # jobs that had ended when it was last shown
        with gr.Row(elem_id="shelf"):
            self.search = gr.Textbox(
                show_label=False, container=False, placeholder="Search prompts, names, seeds", max_length=MAX_SEARCH_CHARS,
                elem_id="search", scale=4, min_width=160,
            )  # fmt: skip
            self.filter = gr.Dropdown(
                list(FILTERS), value="All", show_label=False, container=False, filterable=False, elem_id="filter", scale=1,
                min_width=120,
            )  # fmt: skip
        self.html = gr.HTML(apply_default_css=False, elem_id="gallery", js_on_load=BUTTONS_JS)
        self.query = [self.page, self.search, self.filter]
        self.outputs = [self.html, self.page]

    def wire(
        self, browser: Any, job_id: Any, stage: list[Any], fill: Callable[..., list[Any]], inputs: list[Any],
        follow: Callable[..., None],
    ) -> None:  # fmt: skip
        """`stage`: what is emptied when the job on it is deleted; `follow` follows the job whose id an event has set."""
        query = [browser, *self.query]
        gr.on([self.search.change, self.filter.change], self._search, [browser, self.search, self.filter], self.outputs,
              trigger_mode="always_last", **QUIET)  # fmt: skip
        self.html.turn(self._turn, [browser, self.search, self.filter], self.outputs, **QUIET)
        self.html.star(self._star, query, self.outputs, **QUIET)
        self.html.rename(self._rename, query, self.outputs, **QUIET)
        self.html.undo(self._undo, query, self.outputs, **QUIET)
        self.html.remove(self._delete, [*query, job_id], [*self.outputs, job_id, *stage], **QUIET)
        self.html.reuse(fill, [browser], inputs, **QUIET)
        self.html.carry(None, [browser], None, js=CARRY_JS, **QUIET)
        follow(self.html.again(self._again, [browser], job_id, **QUIET))

    def render(self, owner: str, page: int, search: str = "", wanted: str = "All") -> tuple[str, int]:
        """A page of what is asked for as HTML, and its number (the last one's if `page` is past the end)."""
        mine = self._studio.past(owner)
        every = self._studio.grouped(mine)
        picked = self.find(mine, search, FILTERS.get(wanted, gallery.ALL))
        found = every if picked is mine else self._studio.grouped(picked)
        binned = self._studio.bin.last(owner)
        return gallery.render(
            self._studio, found, page, self._root, num_all=len(every),
            binned=(",".join(one.folder.job_id for one in binned), binned[0].title) if binned else None,
            can_carry=bool(owner) and not owner.startswith("user:"),
        )  # fmt: skip

    def find(self, mine: list[JobFolder], search: str, wanted: str) -> list[JobFolder]:
        """Of the jobs `mine` those that hold every word of `search` in prompt, name or seed and are `wanted`."""
        words = search[:MAX_SEARCH_CHARS].lower().split()
        if not words and wanted == gallery.ALL:
            return mine  # and nothing is read
        found = []
        for folder in mine:
            known = self._look_up(folder)
            if known is not None and known.has(words) and gallery.is_wanted(known, wanted):
                found.append(folder)
        return found

    def is_news(self, seen: int) -> tuple[bool, int]:
        """Whether jobs have ended since so many had, and how many have."""
        now = self._studio.num_ended
        return now != seen, now

    def _look_up(self, folder: JobFolder) -> _Known | None:
        stamp = (_changed_ns(folder.path / "events.jsonl"), _changed_ns(folder.path / "notes.json"))
        known = self._known.get(folder.job_id)
        if known is None or known.stamp != stamp:
            found = self._studio.readable(folder)
            if found is None:
                return None
            notes, request = read_notes(folder), found.request
            text = f"{request.all_text} {notes.name}".lower()
            while len(self._known) >= MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            known = self._known[folder.job_id] = _Known(
                stamp, text, (str(request.seed), folder.job_id), found.state, notes.is_starred
            )
        return known

    # -- events

    def _search(self, token: str, search: str, wanted: str, request: gr.Request) -> tuple[str, int]:
        return self.render(self._owner_of(token, request), 0, search, wanted)

    def _turn(self, token: str, search: str, wanted: str, event: gr.EventData, request: gr.Request) -> tuple[str, int]:
        page = int(event.id) if str(event.id).isdecimal() else 0
        return self.render(self._owner_of(token, request), min(page, 10**6), search, wanted)

    def _star(
        self, token: str, page: int, search: str, wanted: str, event: gr.EventData, request: gr.Request
    ) -> tuple[str, int]:
        return self._change(token, (page, search, wanted), event, request)

    def _rename(
        self, token: str, page: int, search: str, wanted: str, event: gr.EventData, request: gr.Request
    ) -> tuple[str, int]:
        return self._change(token, (page, search, wanted), event, request, name=str(event.name))

    def _change(
        self, token: str, query: tuple[int, str, str], event: gr.EventData, request: gr.Request, **changes: Any
    ) -> tuple[str, int]:
        owner = self._owner_of(token, request)
        try:
            self._studio.note(event.id, owner, **changes)
        except DualParalError as error:
            raise one_sentence(error) from None
        return self.render(owner, *query)

    def _undo(
        self, token: str, page: int, search: str, wanted: str, event: gr.EventData, request: gr.Request
    ) -> tuple[str, int]:
        owner = self._owner_of(token, request)
        try:
            for job_id in str(event.id).split(","):
                self._studio.bin.take_back(job_id, owner)
        except DualParalError as error:
            raise one_sentence(error) from None
        return self.render(owner, page, search, wanted)

    def _delete(
        self, token: str, page: int, search: str, wanted: str, watched: str, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        """Delete a video, for a while only; where it is on the stage, the stage is empty afterwards."""
        owner, job_ids = self._owner_of(token, request), str(event.id).split(",")
        try:
            for job_id in job_ids:
                self._studio.put_away(job_id, owner, batch=job_ids[0])
        except DualParalError as error:
            raise one_sentence(error) from None
        stage: tuple[Any, ...] = (gr.skip(),) * 5
        if watched in job_ids:
            stage = "", gr.update(value=None), "", "", gr.update(visible=True)
        return *self.render(owner, page, search, wanted), *stage

    def _again(self, token: str, event: gr.EventData, request: gr.Request) -> str:
        try:
            return self._studio.again(event.id, self._owner_of(token, request), owners.address_of(request)).job_id
        except DualParalError as error:
            raise one_sentence(error) from None


def _changed_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
