"""`python -m dualparal generate`, of one video or with `--batch FILE` of many: one after the other, by one engine that loads
its model once. Started again, a batch goes on where it was: what it has made is found by its line's key in the job's id.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dualparal.cli.batch_lines import KEY_CHARS, Line, checked, targets_in
from dualparal.cli.flags import given, make_engine
from dualparal.cli.generate import add_generate as add_one
from dualparal.cli.generate import copy_to, kept, run_generate, sigterm_as_ctrl_c, target_of
from dualparal.cli.parser import STOPPED
from dualparal.errors import DualParalError, JobCancelled, OutputError, RequestError
from dualparal.events import Finished
from dualparal.hosts.torchrun import find_team
from dualparal.jobs.folder import JobFolder, list_jobs
from dualparal.paths import expand, is_file, not_empty
from dualparal.request import GenerationRequest

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine
    from dualparal.jobs.job import Job

HELP = "make a video for each line of this file: a prompt, or where it ends in .jsonl an object with the fields of a request"
OF_ONE = ("prompt", "job_id", "look", "baseline", "takes")  # flags that only one video can have
CANNOT = ("failed", "closed")  # states of an engine
OUTCOMES = MADE, THERE, FAILED, STOPPED_NOW, LEFT = "made", "there already", "failed", "stopped", "not begun"


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    add_one(parser)
    parser.add_argument("--batch", type=not_empty, metavar="FILE", help=HELP)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """One video, or a batch; the exit code."""
    if options.batch is None:
        return run_generate(options)
    for name in OF_ONE:
        if getattr(options, name) is not None:
            raise RequestError(f"--{name} is of one video; leave it out with --batch", name)
    if (team := find_team()) is not None and not team.is_front_end:
        return int(make_engine(options).host())
    if options.save_file is not None and os.path.lexists(expand(options.save_file)) and is_file(options.save_file):
        raise RequestError(f"--save_file: {options.save_file} is a file; with --batch it is a folder", "save_file")
    engine = make_engine(options)
    targets = targets_in(options.save_file, target_of)
    lines = checked(engine, expand(options.batch), given(GenerationRequest, options), targets)
    return Batch(engine, lines, export_images=options.export_image).run()


class Batch:
    """Makes the videos of `lines` with `engine`, which is started when there is something to make."""

    def __init__(self, engine: Engine, lines: Sequence[Line], *, export_images: bool = False) -> None:
        self._engine, self._lines, self._export_images = engine, lines, export_images
        self._before = {folder.job_id[-KEY_CHARS:]: folder for folder in _oldest_first(engine)}
        self._counts: Counter[str] = Counter()
        self._faults: list[str] = []
        self._is_stopped = False

    def run(self) -> int:
        """Make what is not there yet; prints a line a video and a summary. The exit code: 0 where all of them are there."""
        with sigterm_as_ctrl_c(), contextlib.closing(self._engine):
            to_make = deque(line for line in self._lines if not self._is_there(line))
            if to_make:
                self._engine.start(wait=False)
                self._make(to_make)
        count = ", ".join(
            f"{self._counts[what]} {what}" for what in (MADE, THERE, FAILED, STOPPED_NOW, LEFT) if self._counts[what]
        )
        print(f"{len(self._lines)} videos: {count}", flush=True)
        for fault in self._faults:
            print(fault, file=sys.stderr, flush=True)
        return STOPPED if self._is_stopped else int(self._counts[MADE] + self._counts[THERE] < len(self._lines))

    def _make(self, to_make: deque[Line]) -> None:
        """One job more than can be worked on is in the queue, so that nothing waits between two videos."""
        under_way: deque[tuple[Line, Job]] = deque()
        try:
            while to_make or under_way:
                while (
                    to_make and len(under_way) <= self._engine.num_replicas and self._engine.state not in ("failed", "closed")
                ):
                    if (job := self._begun(line := to_make.popleft())) is not None:
                        under_way.append((line, job))
                if not under_way:
                    break
                self._follow(*under_way[0])
                under_way.popleft()
        except KeyboardInterrupt:
            print("stopping; Ctrl-C again to quit at once", file=sys.stderr, flush=True)
            self._is_stopped = True
            for _, job in under_way:
                job.cancel()
            for line, job in under_way:
                self._end(line, job)
        self._counts[LEFT] += len(to_make)

    def _is_there(self, line: Line) -> bool:
        """Whether there is nothing to make for a line: its video is made already. Its copy is put where it is missing."""
        folder = self._before.get(line.key)
        try:
            if folder is None or not isinstance(folder.final_event(), Finished) or not is_file(folder.video):
                return False
            if line.target and not is_file(line.target):
                copy_to(folder.video, line.target)
        except DualParalError as error:
            return self._fail(line, error)
        self._counts[THERE] += 1
        print(f"line {line.number}: {line.target or folder.video}: {THERE}", flush=True)
        return True

    def _begun(self, line: Line) -> Job | None:
        """The job of a line: a new one, or the one that an earlier run has not finished."""
        try:
            if (folder := self._before.get(line.key)) is not None:
                job = self._engine.resume(folder.job_id)
            else:
                job_id = f"{time.time_ns() // 10**6:011x}-{line.key}"
                job = self._engine.submit(line.settings, export_images=self._export_images, job_id=job_id)
        except DualParalError as error:
            self._fail(line, error)
            return None
        print(f"job {job.id}", flush=True)
        return job

    def _follow(self, line: Line, job: Job) -> None:
        from dualparal.cli.progress import follow

        print(f"line {line.number}, {self._lines.index(line) + 1} of {len(self._lines)}", file=sys.stderr, flush=True)
        follow(self._engine, job)
        self._end(line, job)

    def _end(self, line: Line, job: Job) -> None:
        try:
            result: Any = job.result()
            told = kept(result, job.request.seed, line.target)
        except JobCancelled as stop:
            self._counts[STOPPED_NOW] += 1
            self._faults.append(f"line {line.number}: {stop}" + (f"; finished part: {stop.path}" if stop.path else ""))
        except DualParalError as error:
            self._fail(line, error)
        else:
            self._counts[MADE] += 1
            print(f"line {line.number}: {told}", flush=True)

    def _fail(self, line: Line, error: DualParalError) -> bool:
        self._counts[FAILED] += 1
        self._faults.append(f"line {line.number}: {error}")
        return True


def _oldest_first(engine: Engine) -> list[JobFolder]:
    """Jobs of the outputs folder. Of two with one key the newer one counts."""
    try:
        return list(reversed(list(list_jobs(engine.outputs))))
    except OutputError:
        return []
