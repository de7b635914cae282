"""`python -m dualparal jobs`: what is in an outputs folder, newest first, also while a server works in it; jobs are stopped and
deleted, whichever program runs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dualparal.errors import DualParalError, RequestError
from dualparal.events import Cancelled, Event, Failed, Finished
from dualparal.jobs.claim import delete_job, is_claimed
from dualparal.jobs.facts import JobFacts, list_facts
from dualparal.jobs.folder import JobFolder, find_job, outputs_folder
from dualparal.jobs.history import STATES
from dualparal.logs import printable
from dualparal.paths import not_empty

PROMPT_CHARS = 48
STOP_WAIT_S = 10.0  # most block steps are shorter; one of a large model takes minutes
OPEN = ("queued", "running", "interrupted")


def add_jobs(jobs: argparse.ArgumentParser) -> None:
    """The flags of `jobs`."""
    jobs.add_argument("--state", action="append", choices=STATES, help="only jobs in this state; repeatable")
    jobs.add_argument("--owner", help="only jobs of this owner")
    jobs.add_argument("--limit", type=_count, default=20, metavar="N", help="at most so many (default: 20)")
    jobs.add_argument("--skip", type=_count, default=0, metavar="N", help="leave out the newest N")
    jobs.add_argument("--json", action="store_true", help="one JSON object a line, with everything that is known")
    last = "'last' is the newest that --state and --owner leave"
    jobs.add_argument(
        "--cancel", nargs="+", action="extend", metavar="ID", default=[],
        help=f"stop these jobs, also those that another program runs; their finished blocks become a video ({last}, not ended)",
    )  # fmt: skip
    jobs.add_argument("--delete", nargs="+", action="extend", metavar="ID", default=[],
                      help=f"remove these jobs with their videos, if nobody works on them ({last})")  # fmt: skip
    jobs.add_argument("--outputs", type=not_empty, metavar="FOLDER", help="default: DUALPARAL_OUTPUTS or outputs")
    jobs.set_defaults(run=_jobs)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return min(number, sys.maxsize // 2)


def _jobs(options: argparse.Namespace) -> int:
    outputs = outputs_folder(options.outputs)
    if options.cancel or options.delete:
        return max(
            _each(options.cancel, lambda name: _cancel(_named(outputs, name, options, OPEN))),
            _each(options.delete, lambda name: _delete(_named(outputs, name, options, STATES))),
        )
    found = list_facts(outputs, owner=options.owner, states=options.state or STATES, skip=options.skip, limit=options.limit)
    if not found and not options.json:
        print(f"no such job in {outputs}", file=sys.stderr)
    for facts in found:
        print(json.dumps(facts.to_json()) if options.json else _line(facts))
    return 0


def _each(names: list[str], do: Callable[[str], str]) -> int:
    """Do it to each of these jobs and print what came of it; the worst exit code."""
    code = 0
    for name in names:
        try:
            print(do(name), flush=True)
        except DualParalError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = max(code, 2 if isinstance(error, RequestError) else 1)
    return code


def _named(outputs: Path, name: str, options: argparse.Namespace, states: Sequence[str]) -> JobFolder:
    if name != "last":
        return find_job(outputs, name)
    wanted = [state for state in options.state or states if state in states]
    found = list_facts(outputs, owner=options.owner, states=wanted, limit=1)
    if not found:
        raise RequestError(f"there is no such job in {outputs}", "job_id")
    return find_job(outputs, found[0].job_id)


def _cancel(folder: JobFolder) -> str:
    from dualparal.jobs.stopping import stop

    before = folder.final_event()
    final = stop(folder, wait_s=STOP_WAIT_S)
    if final is None:
        return f"job {folder.job_id} has been asked to stop; it does so at its next block step"
    if before is not None or not isinstance(final, Cancelled):
        return f"job {folder.job_id} {_end(final)} already; there is nothing to stop"
    part = f"; finished part: {final.path}" if final.path else ""
    return f"job {folder.job_id} was stopped after {final.num_frames} frames{part}"


def _end(final: Event) -> str:
    return "has finished" if isinstance(final, Finished) else "has failed" if isinstance(final, Failed) else "was stopped"


def _delete(folder: JobFolder) -> str:
    if is_claimed(folder) and folder.final_event() is None:
        raise RequestError(f"job {folder.job_id} is being worked on; stop it first with --cancel {folder.job_id}", "job_id")
    delete_job(folder)
    return f"job {folder.job_id} was deleted"


def _line(facts: JobFacts) -> str:
    frames = f"{facts.num_frames}/{facts.num_frames_asked or '?'} frames"
    prompt = " ".join(printable(facts.prompt).split())
    prompt = prompt if len(prompt) <= PROMPT_CHARS else f"{prompt[:PROMPT_CHARS]}…"
    reason = f"  ({printable(facts.error, keep='')})" if facts.error else ""
    return f"{facts.job_id:20} {facts.state:11} {_age(facts.age_s):>5} {frames:18} {prompt}{reason}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
