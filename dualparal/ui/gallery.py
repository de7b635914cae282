"""Past videos: newest first, a page at a time, each with a picture that plays when hovered over, its name and its star."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dualparal.errors import DualParalError
from dualparal.files import is_file
from dualparal.jobs.folder import JobFolder
from dualparal.jobs.notes import read_notes
from dualparal.media.rough import COLUMNS
from dualparal.media.writer import thumbnail
from dualparal.method.rules import plan_of
from dualparal.ui import side_by_side
from dualparal.ui.panels import continue_button, file_url
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.words import ago, duration, safe, short

PER_PAGE = 8
STATE_WORDS = {"cancelled": "stopped", "failed": "failed", "interrupted": "interrupted"}
ALL, STARRED, FINISHED, UNFINISHED = "all", "starred", "finished", "unfinished"
EMPTY = "Videos made in this browser are kept here, with their settings."


class Known(Protocol):
    """What a filter asks of a job."""

    @property
    def state(self) -> str: ...
    @property
    def is_starred(self) -> bool: ...


def is_wanted(known: Known, wanted: str) -> bool:
    """Whether a filter lets a job through."""
    if wanted == STARRED:
        return known.is_starred
    return wanted == ALL or (known.state == "finished") == (wanted == FINISHED)


def render(
    studio: Studio, found: Sequence[Sequence[JobFolder]], page: int, root: str, *, num_all: int,
    binned: tuple[str, str] | None = None, can_carry: bool = False,
) -> tuple[str, int]:  # fmt: skip
    """A page of `found`, of `num_all` in all, as HTML, and its number (the last page's if `page` is past the end): a job
    each, or takes of one request. `binned`: ids and title of what was deleted last and can be had back."""
    page = max(0, min(page, (len(found) - 1) // PER_PAGE))
    cards = "".join(_cards(studio, group, root) for group in found[page * PER_PAGE : (page + 1) * PER_PAGE])
    body = f"<ul>{cards}</ul>" if cards else f'<p class="empty">{EMPTY if not num_all else "Nothing here is like that."}</p>'
    kind = "gallery" if num_all else "gallery none"
    return (
        f'<section class="{kind}">{_head(len(found), num_all, binned, can_carry)}{body}{_pager(len(found), page)}</section>',
        page,
    )


def _cards(studio: Studio, group: Sequence[JobFolder], root: str) -> str:
    """One card for a job or for several takes; what cannot be read has one of its own."""
    read = [(folder, studio.readable(folder)) for folder in group]
    there = sorted((one for _, one in read if one is not None), key=lambda one: one.take.number if one.take else 0)
    damaged = "".join(_damaged(folder.job_id) for folder, one in read if one is None)
    return damaged + ("" if not there else _card(there[0], root) if len(there) == 1 else _takes(there, root))


def _head(num_found: int, num_all: int, binned: tuple[str, str] | None, can_carry: bool) -> str:
    count = (
        "" if not num_all else f"<span>{num_found}</span>" if num_found == num_all else f"<span>{num_found} of {num_all}</span>"
    )
    undo = ""
    if binned is not None:
        button = f'<button type="button" data-do="undo" data-id="{safe(binned[0])}">Undo</button>'
        undo = f'<p class="undo" role="status">Deleted: “{safe(short(binned[1], 60))}” {button}</p>'
    carry = ""
    if can_carry:
        carry = (
            '<span class="carry"><button type="button" data-do="own" class="own-gallery" hidden>Back to this browser’s own'
            "</button>"
            '<button type="button" data-do="carry" title="opens these videos in another browser, and nothing else of this one">'
            'Link to this gallery</button><input class="carried" readonly hidden aria-label="link to this gallery"></span>'
        )
    chosen = side_by_side.chosen() if num_all else ""
    return f"<header><h2>Your videos {count}</h2>{chosen}{carry}</header>{undo}"


def _pager(num_found: int, page: int) -> str:
    num_pages = -(-num_found // PER_PAGE)
    if num_pages < 2:
        return ""

    def button(name: str, to: int, label: str) -> str:
        off = "" if 0 <= to < num_pages else " disabled"
        return f'<button type="button" class="{name}" data-do="turn" data-id="{to}"{off}>{label}</button>'

    newer, older = button("newer", page - 1, "← Newer"), button("older", page + 1, "Older →")
    return f'<nav aria-label="pages">{newer}<span>page {page + 1} of {num_pages}</span>{older}</nav>'


def _button(kind: str, job_id: str, label: str, more: str = "") -> str:
    return f'<button type="button" data-do="{kind}" data-id="{safe(job_id)}"{more}>{label}</button>'


def _damaged(job_id: str) -> str:
    """What cannot be read can be deleted all the same."""
    return (
        f'<li data-job="{safe(job_id)}"><div class="poster"><span>no picture</span></div>'
        f'<p class="prompt">A video whose record is damaged</p><p class="facts">job {safe(job_id)}</p>'
        f'<div class="actions">{_delete(job_id)}</div></li>'
    )


def _delete(job_id: str, label: str = "Delete") -> str:
    return _button("remove", job_id, label, ' class="delete"')


def _takes(takes: Sequence[Snapshot], root: str) -> str:
    """Takes of one request: the picture of each shows it, the rest is about the one that was gone on with."""
    lead = next((take for take in takes if take.video is not None), takes[0])
    request, prompt = lead.request, safe(short(lead.request.all_text, 100)) or "no prompt"
    pictures = "".join(
        _poster_button(take, f"Show take {take.take.number + 1}, seed {take.request.seed}: {prompt}", root)
        for take in takes
        if take.take is not None
    )
    counts = {"finished": sum(take.state == "finished" for take in takes), "at rest": sum(take.is_resting for take in takes)}
    seeds = [take.request.seed for take in takes]
    is_row = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    said = f"{seeds[0]}–{seeds[-1]}" if is_row else ", ".join(map(str, seeds))
    ids = ",".join(take.job_id for take in takes)
    facts = [f"{len(takes)} takes", *(f"{count} {word}" for word, count in counts.items() if count), f"seeds {said}"]
    return (
        f'<li class="takes" data-job="{safe(lead.job_id)}"><div class="mosaic">{pictures}</div>'
        f'<p class="prompt" title="{safe(request.all_text)}">{prompt}</p><p class="facts">{" · ".join(facts)}</p>'
        f'<p class="facts last"><span>{ago(lead.created_s)}</span>{side_by_side.box(lead)}</p>'
        f'<div class="actions">{_button("reuse", lead.job_id, "Use settings")}{continue_button(lead)}'
        f"{_delete(ids, f'Delete all {len(takes)}')}</div></li>"
    )


def _poster_button(found: Snapshot, label: str, root: str) -> str:
    """`label` is safe."""
    moving = f' data-video="{safe(file_url(found.video, root))}"' if found.video else ""
    return (
        f'<button type="button" class="poster" data-do="show" data-id="{safe(found.job_id)}" aria-label="{label}"{moving}>'
        f"{_poster(found, root)}</button>"
    )


def _card(found: Snapshot, root: str) -> str:
    request, job_id = found.request, found.job_id
    prompt = safe(short(request.all_text, 100)) or "no prompt"
    if found.state == "failed":  # a line is enough
        return (
            f'<li class="line" data-job="{safe(job_id)}"><p><em class="failed">failed</em> {prompt} '
            f'<span>{ago(found.created_s)}</span></p><div class="actions">'
            f"{_button('again', job_id, 'Make it again')}{_button('show', job_id, 'Show')}{_delete(job_id)}</div></li>"
        )
    notes = read_notes(found.folder)
    facts = [f"{found.num_frames / request.fps:.1f} s", f"{request.width}×{request.height}", f"seed {request.seed}"]
    if found.is_baseline:
        facts.insert(0, '<em class="plain">plain Wan</em>')
    if found.made_in_s:
        facts.append(f"made in {duration(found.made_in_s)}")
    if found.take is not None:
        facts.insert(0, f"take {found.take.number + 1} of {found.take.num_takes}")
    if found.is_resting:
        facts.append("<em>rests</em>")
    elif found.state in STATE_WORDS:
        facts.append(f'<em class="{found.state}">{STATE_WORDS[found.state]}</em>')
    star = _button(
        "star",
        job_id,
        "★" if notes.is_starred else "☆",
        f' class="star" aria-pressed="{str(notes.is_starred).lower()}" aria-label="star"',
    )
    edit = _button("rename", job_id, "✎", f' class="edit" aria-label="name this video" data-name="{safe(notes.name)}"')
    name = f"<b>{safe(notes.name)}</b> " if notes.name else ""
    return (
        f'<li data-job="{safe(job_id)}">{_poster_button(found, f"Show: {safe(notes.name) or prompt}", root)}{star}'
        f'<p class="name">{name}{edit}</p><p class="prompt" title="{safe(request.all_text)}">{prompt}</p>'
        f'<p class="facts">{" · ".join(facts)}</p>'
        f'<p class="facts last"><span>{ago(found.created_s)}</span>{side_by_side.box(found)}</p>'
        f'<div class="actions">{_button("reuse", job_id, "Use settings")}{continue_button(found)}{_delete(job_id)}</div></li>'
    )


def _poster(found: Snapshot, root: str) -> str:
    poster = found.folder.path / "poster.jpg"
    if not is_file(poster) and found.video is not None:
        try:
            thumbnail(found.video, poster)
        except DualParalError:
            return "<span>no picture</span>"
    if not is_file(poster):
        return _rough(found, root)
    return f'<img src="{safe(file_url(poster, root))}" alt="" loading="lazy">'


def _rough(found: Snapshot, root: str) -> str:
    """The first picture of the first block as it was last seen, out of its sheet (`media.rough`)."""
    sheet = found.folder.look / "0000.jpg"
    if not is_file(sheet):
        return "<span>no frames</span>"
    request, columns = found.request, min(COLUMNS, plan_of(found.request).lengths[0])
    where = f"background:url({safe(file_url(sheet, root))}) 0 0 / {100 * columns}% auto"
    return f'<i class="still" style="aspect-ratio:{request.width}/{request.height};{where}"></i>'
