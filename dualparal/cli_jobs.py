"""`python -m dualparal jobs`: what is in an outputs folder, newest first, also while a server works in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dualparal.runtime.journal import outputs_folder
from dualparal.runtime.logs import printable
from dualparal.runtime.registry import STATES, JobFacts, list_facts

PROMPT_CHARS = 48


def add_jobs_command(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    jobs = commands.add_parser("jobs", help="list the jobs of an outputs folder, newest first")
    jobs.add_argument("--state", action="append", choices=STATES, help="only jobs in this state; repeatable")
    jobs.add_argument("--owner", help="only jobs of this owner")
    jobs.add_argument("--limit", type=_count, default=20, metavar="N", help="at most so many (default: 20)")
    jobs.add_argument("--skip", type=_count, default=0, metavar="N", help="leave out the newest N")
    jobs.add_argument("--json", action="store_true", help="one JSON object a line, with everything that is known")
    jobs.add_argument("--outputs", type=Path, metavar="FOLDER", help="default: DUALPARAL_OUTPUTS or outputs")
    jobs.set_defaults(run=_jobs)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _jobs(options: argparse.Namespace) -> int:
    outputs = outputs_folder(options.outputs)
    found = list_facts(outputs, owner=options.owner, states=options.state or STATES, skip=options.skip, limit=options.limit)
    if not found and not options.json:
        print(f"no such job in {outputs}", file=sys.stderr)
    for facts in found:
        print(json.dumps(facts.to_json()) if options.json else _line(facts))
    return 0


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
