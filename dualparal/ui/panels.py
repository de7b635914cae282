"""The page's words: what a job's state, results, the queue and the engine look like as HTML. Everything is escaped here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from dualparal.events import Failed, Steered, WrappedUp
from dualparal.files import is_file
from dualparal.jobs.notes import read_notes
from dualparal.ui import charts, timeline
from dualparal.ui.estimate import Estimate
from dualparal.ui.snapshot import Snapshot
from dualparal.ui.studio import Studio
from dualparal.ui.words import duration, length, safe, short, size, without_paths

MAX_FILE_CHARS = 60
ENGINE_WORDS = {
    "starting": "Loading the model", "ready": "Ready", "restarting": "Restarting after a fault",
    "failed": "Not available", "closed": "Closed",
}  # fmt: skip


def file_url(path: Path, root: str) -> str:
    """Where the browser finds a file of the outputs folder."""
    return f"{root}gradio_api/file={quote(str(path))}"


def engine_chip(studio: Studio) -> str:
    """The line at the top right: is it ready, what is loaded, on how many stages."""
    engine = studio.engine
    state = engine.state if engine.state in ENGINE_WORDS else "starting"
    grid, rings = engine.grid, "two rings of " if engine.grid.guidance > 1 else ""
    stages = f"{rings}{grid.stages} stage{'s' * (grid.stages != 1)} on {safe(studio.device)}"
    why = (
        f'<p class="engine-error" role="alert">{safe(without_paths(engine.error))}</p>'
        if engine.state == "failed" and engine.error
        else ""
    )
    return (
        f'<div class="chip {state}" role="status"><i></i><b>{ENGINE_WORDS[state]}</b>'
        f"<span>{safe(engine.preset.title)}</span><span>{stages}</span></div>{why}"
    )


def estimate_line(estimate: Estimate) -> str:
    """Frames, blocks, time and memory of the chosen settings, before Generate."""
    facts = [f"<b>{estimate.num_frames}</b> frames", f"<b>{estimate.seconds:.1f}</b> s"]
    facts.append(f"<b>{estimate.num_blocks}</b> block{'s' * (estimate.num_blocks != 1)}")
    if estimate.is_endless:
        facts = ["<b>endless</b>", "until it is finished or stopped"]
    elif estimate.time_s is None:
        facts.append("time known after the first video")
    else:
        facts.append(f"about <b>{duration(estimate.time_s)}</b> to make")
        if estimate.wait_s:
            facts.append(f"ready in about <b>{duration(estimate.wait_s + estimate.time_s)}</b>, after those in line")
    if estimate.bytes_per_rank is not None:
        facts.append(f"<b>{size(estimate.bytes_per_rank)}</b> per stage")
    chosen = "".join(f'<p class="chosen">{safe(said)}</p>' for said in (estimate.chosen, estimate.idle) if said)
    notice = f'<p role="alert">{safe(estimate.refusal)}</p>' if estimate.refusal else chosen
    kind = "estimate bad" if estimate.refusal else "estimate"
    return f'<div class="{kind}"><span>{"</span><span>".join(facts)}</span>{notice}</div>'


def steered(told: Steered) -> str:
    """Below the board, once a new prompt has been taken."""
    notice = f" ({safe(told.notice)})" if told.notice else ""
    return f'<p role="status">From {told.from_s:.1f} s on: “{safe(short(told.prompt, 120))}”{notice}</p>'


def wrapped_up(told: WrappedUp, fps: int) -> str:
    """Below the board, once an endless film has an end."""
    blocks = f"{told.num_blocks} block{'s' * (told.num_blocks != 1)}"
    return f'<p role="status">The film will have {told.num_frames / fps:.1f} s: {blocks}, of which the last are under way</p>'


def estimate_problem(message: str) -> str:
    """In place of the estimate when the settings are not usable."""
    return f'<div class="estimate bad"><p role="alert">{safe(message)}</p></div>'


def headline(found: Snapshot, studio: Studio) -> tuple[str, str]:
    """State and detail of a job, as two short plain texts."""
    if found.state == "queued":
        if studio.engine.state in ("starting", "restarting"):
            return "Waiting", "the model is loading" if studio.engine.state == "starting" else "the engine is restarting"
        if found.waits_for:
            return "Waiting", f"{without_paths(found.waits_for)}; it starts by itself once there is room"
        ahead = "next in line" if found.position == 0 else f"{found.position} ahead of you"
        wait_s = studio.starts_in_s(found.job_id)
        return "Waiting", ahead + (f", starts in about {duration(wait_s)}" if wait_s else "")
    if found.state == "running":
        progress = found.progress
        if progress is None:
            return "Preparing", "reading the prompt"
        if found.request.is_endless and progress.is_held:
            return "Waiting for you", f"{length(found.num_frames, found.request.fps)} ready; it goes on as you watch"
        if found.request.is_endless:
            return "Denoising", f"{length(found.num_frames, found.request.fps)} ready, without an end"
        share = progress.items_done / max(1, progress.num_items)
        if progress.items_done >= progress.num_items:
            return "Decoding", f"{len(found.blocks)} of {len(progress.block_steps)} blocks ready"
        eta = f"about {duration(progress.eta_s)} left" if progress.eta_s is not None else "estimating the time left"
        return f"Denoising {share * 100:.0f} %", eta
    kept = f"{length(found.num_frames, found.request.fps)} kept" if found.video else "no block was finished"
    if found.state == "finished":
        made = found.made_in_s
        return "Done", length(found.num_frames, found.request.fps) + (f", made in {duration(made)}" if made else "")
    if found.is_resting:
        return "Resting", "a first look; it goes on from here when you choose it"
    if found.state == "cancelled":
        return "Stopped", kept
    if found.state == "failed":
        message = without_paths(found.final.message) if isinstance(found.final, Failed) else "the job failed"
        return "Failed", f"{message} ({kept})"
    return "Interrupted", f"the server ended while this ran ({kept})"


def board(found: Snapshot, studio: Studio, root: str = "") -> str:
    """Under the video: state, time left, first frames, the strip of blocks, the stages' meters."""
    head, detail = headline(found, studio)
    # A running job's words change every second, which nobody wants read out; the progress bar can be asked.
    alert = {"failed": ' role="alert"', "running": ""}.get(found.state, ' role="status"')
    first = found.history.first_frames_s
    progress = found.progress
    first_words = ""
    if first is not None:
        first_words = f'<span class="first">first frames after {duration(first)}</span>'
    elif (
        found.state == "running"
        and progress
        and not found.blocks
        and (wait_s := studio.estimator.first_frames_in_s(found.request, progress)) is not None
    ):
        first_words = f'<span class="first">first frames in about {duration(wait_s)}</span>'
    share = 1.0 if found.state == "finished" else progress.items_done / max(1, progress.num_items) if progress else 0.0
    notices = [found.request.fitted, found.started.notice if found.started else ""]
    notice = "".join(f'<p class="notice">{safe(said)}</p>' for said in notices if said)
    return (
        f'<section class="board {found.state}" data-job="{safe(found.job_id)}" data-state="{found.state}">'
        f'<p class="headline"{alert}><i></i><b>{safe(head)}</b><span>{safe(detail)}</span>{first_words}</p>'
        f"{_progress_bar(found, share)}"
        f"{timeline.shots_row(found.request, charts.num_entered(found) if found.request.is_endless else None)}"
        f"{charts.strip(found, root)}{charts.meters(progress if found.state == 'running' else None, studio.engine.grid.names)}"
        f'{notice}<p class="asked">“{safe(short(found.request.all_text, 160))}”</p></section>'
    )


def _progress_bar(found: Snapshot, share: float) -> str:
    """How far the job is, and in `data-told` what of it the tab's title says; a film without an end has no share of it."""
    if found.request.is_endless:
        told = f"{found.num_frames / found.request.fps:.1f} s"
        about = f'aria-label="progress" aria-valuetext="{told} ready" data-told="{told}"'
        return f'<div class="progress endless" role="progressbar" {about}><i></i></div>'
    percent = f"{share * 100:.0f}"
    return (
        f'<div class="progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}" '
        f'aria-label="progress" data-told="{percent} %"><i style="--done:{share:.4f}"></i></div>'
    )


def result(found: Snapshot, root: str, can_resume: bool = False, can_compare: bool = False) -> str:
    """After a job: download, go on, timings, the stages' timeline, the settings as JSON. '' while it runs."""
    if not found.is_ended:
        return ""
    request, video = found.request, found.video
    download = more = ""
    if video is not None:
        name = name_of(found)
        named = _under_own_name(video, name)
        url, amount = safe(file_url(named, root)), size(os.path.getsize(video) if is_file(video) else 0)
        download = f'<a class="download" href="{url}" download="{safe(named.name)}">Download mp4 <span>{amount}</span></a>'
        others = (("frame", "This frame as PNG"), ("frames", "All frames as zip"), ("plain", "mp4 without settings"))
        for kind, label in others:
            about = f'data-do="{kind}" data-id="{safe(found.job_id)}" data-name="{safe(name)}"'
            more += f'<button type="button" {about}>{label}</button>'
        more = f'<details class="more"><summary>Other files</summary><div>{more}</div></details>'
    go_on = f'<button type="button" data-do="resume" data-id="{safe(found.job_id)}">Resume</button>' if can_resume else ""
    go_on += continue_button(found)
    if can_compare:
        hint = "the same request through diffusers’ WanPipeline in one pass, when nothing else runs"
        button = f'<button type="button" data-do="compare" data-id="{safe(found.job_id)}" title="{hint}">'
        go_on += f"{button}Compare with plain Wan</button>"
    timings = found.timings
    bar = f"<h3>Where the time went</h3>{charts.timings_bar(timings)}" if timings else ""
    plot = charts.timeline(found.spans)
    plot = f"<h3>When each stage worked</h3>{plot}" if plot else ""
    settings = json.dumps(request.model_dump(exclude_none=True), ensure_ascii=False, indent=2)
    facts = {"size": f"{request.width}×{request.height}", "seed": request.seed, "steps": request.num_inference_steps,
             "guidance": f"{request.guidance_scale:g}", "job": found.job_id}  # fmt: skip
    if found.is_baseline:
        facts["made by"] = "plain Wan, one pass"
    if found.made_in_s:
        facts["total"] = duration(found.made_in_s)
    rows = "".join(f"<div><dt>{name}</dt><dd>{safe(value)}</dd></div>" for name, value in facts.items())
    stored = f'<summary>Settings as JSON</summary><pre tabindex="0">{safe(settings)}</pre>'
    return (
        f'<section class="result"><div class="result-top"><dl>{rows}</dl><span>{go_on}{download}</span></div>{more}{bar}{plot}'
        f'<details class="settings">{stored}</details></section>'
    )


def continue_button(found: Snapshot) -> str:
    """A film goes on where another ended; '' where nothing was kept for that."""
    if not found.can_go_on:
        return ""
    hint = "fill in its settings, to make what comes next"
    return f'<button type="button" data-do="extend" data-id="{safe(found.job_id)}" title="{hint}">Continue</button>'


def name_of(found: Snapshot) -> str:
    """What files of a job are called: after its name or prompt, and its seed."""
    text = read_notes(found.folder).name or found.request.all_text
    words = "-".join(re.findall(r"\w+", text.lower()))[:MAX_FILE_CHARS].strip("-_")
    while len(words.encode()) > 2 * MAX_FILE_CHARS:
        words = words[:-1]
    return f"{words or 'dualparal'}-seed{found.request.seed}"


def _under_own_name(video: Path, name: str) -> Path:
    """A hard link to the video under its own name, because browsers save a file under the name it is served with."""
    named = video.with_name(f"{name}.mp4")
    try:
        if named.exists() and not named.samefile(video):  # the job was resumed and its video written anew
            named.unlink()
        if not named.exists():
            named.hardlink_to(video)
    except OSError:  # a file system without links
        return video
    return named


def queue(studio: Studio, owner: str, watched: str = "") -> str:
    """Everybody's place in line: own jobs with prompt and buttons, others' as nameless rows.

    '' when there is nothing to tell: nobody at work, or only the job `watched` in this tab.
    """
    jobs = studio.engine.jobs()
    if not jobs or [job.id for job in jobs] == [watched]:
        return ""
    rows, groups = [], set()
    for place, job in enumerate(jobs):
        take = job.run.take
        if take is not None and take.group in groups:
            continue  # takes are one row
        groups |= {take.group} if take else set()
        running = job.state == "running"
        wait_s = None if running else studio.starts_in_s(job.id)
        when = "running" if running else f"place {place + 1}" + (f", starts in about {duration(wait_s)}" if wait_s else "")
        long = f"{job.request.num_frames / job.request.fps:.1f} s" + (f" · {take.num_takes} takes" if take else "")
        if owner and job.owner == owner:
            name = safe(short(job.request.all_text, 70)) or "no prompt"
            buttons = f'<button type="button" data-do="halt" data-id="{job.id}">Stop</button>'
            if job.id != watched:
                buttons = f'<button type="button" data-do="show" data-id="{job.id}">Watch</button>{buttons}'
            rows.append(f'<li class="own"><span class="what">{name}</span><span>{long} · {when}</span>{buttons}</li>')
        else:
            rows.append(f'<li><span class="what">Someone else’s video</span><span>{long} · {when}</span></li>')
    return f'<section class="queue"><h3>In line</h3><ol>{"".join(rows)}</ol></section>'
