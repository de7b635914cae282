"""Past videos: newest first, a page at a time, each with a thumbnail, its settings, "use again" and delete."""

from __future__ import annotations

from itertools import islice

from dualparal.errors import DualParalError
from dualparal.media.writer import thumbnail
from dualparal.ui.panels import file_url
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.words import ago, duration, safe, short

PER_PAGE = 8
STATE_WORDS = {"cancelled": "stopped", "failed": "failed", "interrupted": "interrupted"}


def render(studio: Studio, owner: str, page: int, root: str) -> tuple[str, int]:
    """One page of the gallery as HTML, and its number (the last page's if `page` is past the end)."""
    page = max(0, page)
    found = list(islice(studio.past(owner), page * PER_PAGE, (page + 1) * PER_PAGE + 1))
    if not found and page:
        return render(studio, owner, page - 1, root)
    if not found:
        empty = "Videos made in this browser are kept here, with their settings."
        return f'<section class="gallery"><h2>Your videos</h2><p class="empty">{empty}</p></section>', 0
    cards = "".join(_card(one, root) for one in found[:PER_PAGE])
    newer = _pager("newer", page - 1, page > 0, "← Newer")
    older = _pager("older", page + 1, len(found) > PER_PAGE, "Older →")
    pager = f'<nav aria-label="pages">{newer}<span>page {page + 1}</span>{older}</nav>'
    if not page and len(found) <= PER_PAGE:
        pager = ""
    return f'<section class="gallery"><h2>Your videos</h2><ul>{cards}</ul>{pager}</section>', page


def _pager(name: str, page: int, is_on: bool, label: str) -> str:
    off = "" if is_on else " disabled"
    return f'<button type="button" class="{name}" data-do="turn" data-id="{page}"{off}>{label}</button>'


def _card(found: Snapshot, root: str) -> str:
    request, job_id = found.request, safe(found.job_id)
    prompt = safe(short(request.prompt, 100)) or "no prompt"
    facts = [f"{found.num_frames / (request.fps or 16):.1f} s", f"{request.width}×{request.height}", f"seed {request.seed}"]
    if found.timings.get("total_s"):
        facts.append(f"made in {duration(found.timings['total_s'])}")
    if found.state in STATE_WORDS:
        facts.append(f'<em class="{found.state}">{STATE_WORDS[found.state]}</em>')
    buttons = (
        f'<button type="button" data-do="reuse" data-id="{job_id}">Use settings</button>'
        f'<button type="button" data-do="remove" data-id="{job_id}" class="delete">Delete</button>'
    )
    return (
        f'<li data-job="{job_id}"><button type="button" class="poster" data-do="show" data-id="{job_id}" '
        f'aria-label="Show: {prompt}">{_poster(found, root)}</button>'
        f'<p class="prompt" title="{safe(request.prompt)}">{prompt}</p>'
        f'<p class="facts">{" · ".join(facts)}</p><p class="facts">{ago(found.created_s)}</p>'
        f'<div class="actions">{buttons}</div></li>'
    )


def _poster(found: Snapshot, root: str) -> str:
    poster = found.folder.path / "poster.jpg"
    if not poster.is_file() and found.video is not None:
        try:
            thumbnail(found.video, poster)
        except DualParalError:
            return "<span>no picture</span>"
    if not poster.is_file():
        return "<span>no frames</span>"
    return f'<img src="{safe(file_url(poster, root))}" alt="" loading="lazy">'
