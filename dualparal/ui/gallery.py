"""Past videos: newest first, a page at a time, each with a thumbnail, its settings, "use again" and delete."""

from __future__ import annotations

from dualparal.errors import DualParalError
from dualparal.files import is_file
from dualparal.media.writer import thumbnail
from dualparal.ui.panels import file_url
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.words import ago, duration, safe, short

PER_PAGE = 8
STATE_WORDS = {"cancelled": "stopped", "failed": "failed", "interrupted": "interrupted"}


def render(studio: Studio, owner: str, page: int, root: str) -> tuple[str, int]:
    """One page of the gallery as HTML, and its number (the last page's if `page` is past the end)."""
    mine = studio.past(owner)
    page = max(0, min(page, (len(mine) - 1) // PER_PAGE))
    shown = [(folder, studio.readable(folder)) for folder in mine[page * PER_PAGE : (page + 1) * PER_PAGE]]
    has_older = len(mine) > (page + 1) * PER_PAGE
    if not mine:
        empty = "Videos made in this browser are kept here, with their settings."
        return f'<section class="gallery"><h2>Your videos</h2><p class="empty">{empty}</p></section>', 0
    cards = "".join(_damaged(folder.job_id) if one is None else _card(one, root) for folder, one in shown)
    newer = _pager("newer", page - 1, page > 0, "← Newer")
    older = _pager("older", page + 1, has_older, "Older →")
    pager = f'<nav aria-label="pages">{newer}<span>page {page + 1}</span>{older}</nav>'
    if not page and not has_older:
        pager = ""
    return f'<section class="gallery"><h2>Your videos</h2><ul>{cards}</ul>{pager}</section>', page


def _pager(name: str, page: int, is_on: bool, label: str) -> str:
    off = "" if is_on else " disabled"
    return f'<button type="button" class="{name}" data-do="turn" data-id="{page}"{off}>{label}</button>'


def _damaged(job_id: str) -> str:
    """What cannot be read can be deleted all the same."""
    button = f'<button type="button" data-do="remove" data-id="{safe(job_id)}" class="delete">Delete</button>'
    return (
        f'<li data-job="{safe(job_id)}"><div class="poster"><span>no picture</span></div>'
        f'<p class="prompt">A video whose record is damaged</p><p class="facts">job {safe(job_id)}</p>'
        f'<div class="actions">{button}</div></li>'
    )


def _card(found: Snapshot, root: str) -> str:
    request, job_id = found.request, safe(found.job_id)
    prompt = safe(short(request.all_text, 100)) or "no prompt"
    facts = [f"{found.num_frames / request.fps:.1f} s", f"{request.width}×{request.height}", f"seed {request.seed}"]
    if found.made_in_s:
        facts.append(f"made in {duration(found.made_in_s)}")
    if found.state in STATE_WORDS:
        facts.append(f'<em class="{found.state}">{STATE_WORDS[found.state]}</em>')
    buttons = (
        f'<button type="button" data-do="reuse" data-id="{job_id}">Use settings</button>'
        f'<button type="button" data-do="remove" data-id="{job_id}" class="delete">Delete</button>'
    )
    return (
        f'<li data-job="{job_id}"><button type="button" class="poster" data-do="show" data-id="{job_id}" '
        f'aria-label="Show: {prompt}">{_poster(found, root)}</button>'
        f'<p class="prompt" title="{safe(request.all_text)}">{prompt}</p>'
        f'<p class="facts">{" · ".join(facts)}</p><p class="facts">{ago(found.created_s)}</p>'
        f'<div class="actions">{buttons}</div></li>'
    )


def _poster(found: Snapshot, root: str) -> str:
    poster = found.folder.path / "poster.jpg"
    if not is_file(poster) and found.video is not None:
        try:
            thumbnail(found.video, poster)
        except DualParalError:
            return "<span>no picture</span>"
    if not is_file(poster):
        return "<span>no frames</span>"
    return f'<img src="{safe(file_url(poster, root))}" alt="" loading="lazy">'
