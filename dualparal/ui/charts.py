"""Small pictures drawn as HTML and SVG: the strip of blocks, the stages' meters, the timeline of a finished job.

Colours come from `style.css`, so they follow light and dark. Only numbers and escaped words go in.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualparal.events import Progress
from dualparal.messages import Span
from dualparal.method.rules import plan_of
from dualparal.ui import looks
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.words import duration, safe

TIMELINE_WIDTH = 1000
ROW_HEIGHT = 22
MOST_SPANS = 2000
COLUMNS = 250
MAX_CELLS = 200  # of a strip


def strip(found: Snapshot, root: str = "") -> str:
    """The video as a strip of blocks, as wide as each is long, filling up from below as it is denoised.

    The page's scripts draw the playhead and each block's early look, and seek when a block is clicked or come to with the
    arrow keys (`data-from` is in seconds).
    """
    request = found.request
    plan = plan_of(request)
    sizes = plan.lengths
    ready = {event.block for event in found.blocks}
    num_steps = request.num_inference_steps
    steps = found.progress.block_steps if found.progress else ()
    cells, first, looked = [], 0, looks.cells(found, root)
    sizes = sizes[: num_entered(found)] if request.is_endless else sizes
    num_joined = min(len(ready), max(0, len(sizes) - MAX_CELLS)) if ready == set(range(len(ready))) else 0
    if num_joined:  # blocks finish in order; one cell for all that are long ready, so that an endless film's page stays small
        first = plan.frames(num_joined).start
        cells.append(
            f'<i class="block ready" style="flex-grow:{first};--done:1.000" data-block="0" data-from="0.0000" '
            f'data-pictures="1" title="blocks 1 to {num_joined}: ready"></i>'
        )
    for block, num_latents in enumerate(sizes[num_joined:], num_joined):
        done = num_steps if block in ready else steps[block] if block < len(steps) else 0
        state = "ready" if block in ready else "moving" if done else "waiting"
        if found.is_ended and block not in ready:
            state = "lost"
        num_frames = plan.num_frames_of(block)
        label = f"block {block + 1}: {'ready' if block in ready else f'step {done} of {num_steps}'}"
        cells.append(
            f'<i class="block {state}" style="flex-grow:{num_frames};--done:{done / num_steps:.3f}" '
            f'data-block="{block}" data-from="{first / request.fps:.4f}" data-pictures="{num_latents}" title="{label}"'
            f"{looked.get(block, '')}></i>"
        )
        first += num_frames
    total_s = first / request.fps
    count = f"{len(ready)} block{'s' * (len(ready) != 1)}" if request.is_endless else f"{len(ready)} of {len(sizes)} blocks"
    summary, end = f"{count} ready", "…" if request.is_endless and not found.is_ended else f"{total_s:.1f} s"
    dense = " dense" if len(sizes) > 48 else ""
    about = f'data-seconds="{total_s:.4f}" data-steps="{num_steps}" data-waits="{looks.waits(found)}"'
    about += " data-endless" * request.is_endless
    return (
        f'<div class="strip{dense}" role="slider" tabindex="0" aria-label="place in the film" aria-valuemin="0" '
        f'aria-valuemax="{total_s:.1f}" aria-valuenow="0" aria-valuetext="{summary}" {about}>{"".join(cells)}</div>'
        f'<div class="strip-scale"><span>0 s</span><span>{summary}</span><span>{end}</span></div>'
    )


def num_entered(found: Snapshot) -> int:
    """Of an endless film, how many blocks have begun, at least one: what is planned ahead of them is nobody's promise."""
    steps = found.progress.block_steps if found.progress else ()
    entered = [block for block, done in enumerate(steps) if done]
    return 1 + max((*(event.block for event in found.blocks), *entered), default=0)


def meters(progress: Progress | None, stages: Sequence[str]) -> str:
    """One bar for each of these: the share of the last seconds in which it computed."""
    if progress is None or not progress.busy:
        return ""
    bars = "".join(
        f'<div class="meter"><span>{name}</span><b style="--share:{min(1.0, max(0.0, share)):.3f}"></b>'
        f"<span>{share * 100:.0f} %</span></div>"
        for name, share in zip(stages, progress.busy, strict=False)
    )
    return f'<div class="meters" aria-label="share of the last seconds in which each stage computed">{bars}</div>'


def timings_bar(timings: dict[str, float]) -> str:
    """Where the time went, as one stacked bar and a legend with numbers."""
    parts = [(name, timings.get(f"{name}_s", 0.0)) for name in ("text", "denoise", "decode", "encode")]
    total_s = sum(seconds for _, seconds in parts) or 1.0
    bar = "".join(f'<i class="part {name}" style="flex-grow:{seconds / total_s:.4f}"></i>' for name, seconds in parts)
    legend = "".join(f'<li class="{name}">{name} <b>{duration(seconds)}</b></li>' for name, seconds in parts)
    return f'<div class="shares" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul>'


def timeline(spans: Sequence[Span]) -> str:
    """When each stage worked on which block: a row per stage, time to the right. '' without spans."""
    if not spans:
        return ""
    names = sorted({span.stage for span in spans}, key=_row_order)
    end_s = max(span.end_s for span in spans) or 1.0
    num_blocks = max(span.block for span in spans) + 1
    bars = "".join(_bar(span, names.index(span.stage), end_s, num_blocks) for span in _thinned(spans))
    labels = "".join(f"<span>{safe(name)}</span>" for name in names)
    height = ROW_HEIGHT * len(names)
    return (
        f'<div class="timeline" role="img" aria-label="when each stage worked, {duration(end_s)} in all">'
        f'<div class="rows">{labels}</div><div class="plot"><svg viewBox="0 0 {TIMELINE_WIDTH} {height}" '
        f'preserveAspectRatio="none" style="height:{height}px" aria-hidden="true">{bars}</svg>'
        f'<div class="scale"><span>0 s</span><span>colour: first to last block</span><span>{duration(end_s)}</span></div>'
        "</div></div>"
    )


def _row_order(name: str) -> tuple[int, str]:
    order = {"text": 0, "decode": 2, "encode": 3}
    return order.get(name, 1), f"{name:>12}"


def _thinned(spans: Sequence[Span]) -> list[Span]:
    """At most MOST_SPANS bars; when there are more, one per row and column of the plot, as wide as its share of work."""
    if len(spans) <= MOST_SPANS:
        return list(spans)
    column_s = max(span.end_s for span in spans) / COLUMNS
    merged: dict[tuple[str, int], Span] = {}
    for span in spans:
        column = min(COLUMNS - 1, int(span.start_s / column_s))
        start_s = column * column_s
        old = merged.get((span.stage, column))
        worked_s = span.end_s - span.start_s + (old.end_s - start_s if old else 0.0)
        end_s = min(start_s + worked_s, COLUMNS * column_s)
        merged[span.stage, column] = Span(span.stage, start_s, end_s, span.block, span.step)
    return list(merged.values())


def _bar(span: Span, row: int, end_s: float, num_blocks: int) -> str:
    left = span.start_s / end_s * TIMELINE_WIDTH
    width = max(0.6, (span.end_s - span.start_s) / end_s * TIMELINE_WIDTH)
    # From teal for the first block to amber for the last; text and other work without a block is grey.
    has_block = span.block >= 0 and span.stage != "text"
    hue = f"hsl({185 - 145 * span.block / max(1, num_blocks - 1):.0f} 60% 48%)" if has_block else "var(--ink-3)"
    return f'<rect x="{left:.1f}" y="{row * ROW_HEIGHT + 3}" width="{width:.1f}" height="{ROW_HEIGHT - 6}" fill="{hue}"/>'
