"""`python -m dualparal generate` and `resume`: make one video, or go on with one, and follow it on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualparal.cli.flags import add_engine_flags, add_request_flags, given, make_engine
from dualparal.cli.parser import STOPPED
from dualparal.errors import DualParalError, JobCancelled, OutputError, RequestError
from dualparal.events import Cancelled, Finished
from dualparal.files import replace_durably
from dualparal.hosts.torchrun import find_team
from dualparal.jobs.claim import is_claimed
from dualparal.jobs.folder import JobFolder, check_job_id, find_job, list_jobs, new_job_id, outputs_folder
from dualparal.options import EngineOptions, recorded
from dualparal.paths import expand, is_file, is_folder, not_empty, why_missing
from dualparal.request import GenerationRequest

LOOK_HELP = "keep the rough film so far here, an animated WebP that sharpens while the video is made"
SAVE_FILE = "also copy the finished video here (a folder: into it, under the job's id)"


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The flags of one video."""
    add_request_flags(parser, needs_prompt=False)  # `batch` has its prompts in a file
    add_engine_flags(parser)
    parser.add_argument("--save_file", type=not_empty, metavar="MP4", help=SAVE_FILE)
    parser.add_argument("--look", type=not_empty, metavar="WEBP", help=LOOK_HELP)
    parser.add_argument("--export_image", action="store_true", help="also write every frame as PNG")
    parser.add_argument(
        "--baseline", choices=("wan",), help="make it with diffusers' own WanPipeline on one device instead, to compare"
    )
    parser.add_argument("--job_id", help="id of the job and name of its folder (default: drawn)")
    parser.set_defaults(run=run_generate)


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The flags of `resume`."""
    parser.add_argument("job", help="the job's id, or 'last' for the newest unfinished one")
    parser.add_argument("--save_file", type=not_empty, metavar="MP4", help=SAVE_FILE)
    parser.add_argument("--look", type=not_empty, metavar="WEBP", help=LOOK_HELP)
    parser.add_argument("--anyway", action="store_true", help="also if the model's or a LoRA's files were overwritten since")
    add_engine_flags(parser, can_undo=True)
    parser.set_defaults(run=run_resume)


def run_generate(options: argparse.Namespace) -> int:
    if options.prompt is None:
        raise RequestError("--prompt is missing: say what the video shows, or name a file of lines with --batch", "prompt")
    request = GenerationRequest(**given(GenerationRequest, options))
    job_id = check_job_id(options.job_id) if options.job_id else new_job_id()
    if (team := find_team()) is None or team.is_front_end:
        options.save_file = target_of(options.save_file, job_id)
        options.look = target_of(options.look, job_id, "look", ".webp")
    engine = make_engine(options)
    if engine.team and not engine.team.is_front_end:
        return int(engine.host())
    if (request.takes or 1) > 1:
        return _run_takes(engine, request, options)
    settings = engine.resolve(request)
    print(f"job {job_id}", flush=True)
    if options.baseline:
        with sigterm_as_ctrl_c(), contextlib.closing(engine):  # whose own workers are not needed
            job = engine.compare(settings, export_images=options.export_image, job_id=job_id)
            return finish_job(engine, job, options.save_file)
    with sigterm_as_ctrl_c(), contextlib.closing(engine.start(wait=False)):
        job = engine.submit(settings, export_images=options.export_image, job_id=job_id)
        return finish_job(engine, job, options.save_file, options.look)


def _run_takes(engine: Any, request: GenerationRequest, options: argparse.Namespace) -> int:
    """Make several takes up to their first looks and say how each goes on. Returns the exit code."""
    from dualparal.cli.look import LookFile
    from dualparal.cli.progress import follow

    if options.baseline or options.job_id or options.save_file:
        raise RequestError(
            "--takes are several videos at their first look: leave out --baseline, --job_id and --save_file", "takes"
        )
    code = 0
    with sigterm_as_ctrl_c(), contextlib.closing(engine.start(wait=False)):
        jobs = engine.submit_takes(request, request.takes)
        try:
            for number, job in enumerate(jobs, 1):
                print(f"job {job.id}", flush=True)
                look = options.look and options.look.with_stem(f"{options.look.stem}-{number}")
                follow(engine, job, LookFile(look, job) if look else None)
                final = job.view().final
                code = max(code, 0 if isinstance(final, Cancelled) else 1)
                seen = f"; its look is {look}" if look else ""
                print(f"take {number}, seed {job.request.seed}{seen}: go on with `resume {job.id}`", flush=True)
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel()
            return STOPPED
    return code


def run_resume(options: argparse.Namespace) -> int:
    outputs = outputs_folder(options.outputs)
    if options.job == "last":
        folder = next((job for job in list_jobs(outputs) if _may_go_on(job)), None)
        if folder is None:
            raise RequestError(f"there is no unfinished job in {outputs}", "job")
    else:
        folder = find_job(outputs, options.job)
    options.save_file = target_of(options.save_file, folder.job_id)
    options.look = target_of(options.look, folder.job_id, "look", ".webp")
    record = folder.record()
    options.model_id = options.model_id or record.get("model")
    engine = make_engine(options, **recorded(record, given(EngineOptions, options)))
    print(f"job {folder.job_id}", flush=True)
    with sigterm_as_ctrl_c(), contextlib.closing(engine.start(wait=False)):
        return finish_job(engine, engine.resume(folder.job_id, anyway=options.anyway), options.save_file, options.look)


def _may_go_on(job: JobFolder) -> bool:
    """Whether `resume last` may mean this job."""
    try:
        is_over = isinstance(job.final_event(), Finished) or job.record().get("baseline") or job.record().get("has_tensors")
    except DualParalError as error:  # a power cut may leave a job unreadable
        print(f"left out: {error}", file=sys.stderr, flush=True)
        return False
    return not is_over and not is_claimed(job)


def finish_job(engine: Any, job: Any, save_file: Path | None, look: Path | None = None) -> int:
    """Follow a job to its end on the terminal; Ctrl-C stops it and keeps the finished part. Returns the exit code."""
    from dualparal.cli.look import LookFile
    from dualparal.cli.progress import follow

    try:
        _wrap_up_on_ctrl_c(job, lambda: follow(engine, job, LookFile(look, job) if look else None))
    except KeyboardInterrupt:
        print("stopping; Ctrl-C again to quit at once", file=sys.stderr, flush=True)
        job.cancel()
    try:
        result = job.result()
    except JobCancelled as stop:
        print(f"{stop}" + (f"; finished part: {stop.path}" if stop.path else ""), file=sys.stderr, flush=True)
        if stop.path and save_file:
            copy_to(Path(stop.path), save_file)
        return STOPPED
    print(kept(result, job.request.seed, save_file), flush=True)
    return 0


def _wrap_up_on_ctrl_c(job: Any, follow: Callable[[], None]) -> None:
    """Follow a job; the first Ctrl-C gives an endless film its end."""
    try:
        follow()
    except KeyboardInterrupt as stop:
        if not job.request.is_endless or job.state != "running" or isinstance(stop, Terminated):
            raise
        print("finishing the blocks under way; Ctrl-C again to stop at once", file=sys.stderr, flush=True)
        with contextlib.suppress(RequestError):  # it has ended meanwhile
            job.finish()
        follow()


def kept(result: Any, seed: int | None, save_file: Path | None) -> str:
    """Copy a finished video to where it is wanted; a line about it."""
    path = Path(result.path)
    if save_file:
        copy_to(path, save_file)
        path = save_file
    times = ", ".join(f"{name.removesuffix('_s')} {seconds:.1f} s" for name, seconds in result.timings.items())
    return f"{path}: {result.num_frames} frames, seed {seed}; {times}"


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever sends it does not wait long."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Any:
    def interrupt(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def target_of(wanted: str | None, job_id: str, flag: str = "save_file", ending: str = ".mp4") -> Path | None:
    """The file that a flag names: itself, or one in the folder that it names, which is made. Found out before the run, not
    after it, that nothing can be put there. Raises `OutputError`, `RequestError`."""
    if wanted is None:
        return None
    target = expand(wanted)
    if is_folder(target) or wanted.endswith(("/", "/.", "/..")):
        target /= f"{job_id}{ending}"
    if why := why_missing(target):
        raise OutputError(f"{target} cannot be written{why}; name another --{flag}")
    if os.path.exists(target) and not is_file(target):
        raise OutputError(f"{target} is no file that a video can be put in; name another --{flag}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial := _partial(target)).touch()
        partial.unlink()
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another --{flag}") from None
    return target


def copy_to(source: Path, target: Path) -> None:
    partial = _partial(target)
    try:
        shutil.copyfile(source, partial)
        replace_durably(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"{target} could not be written: {error.strerror}; the video is in {source}") from None


def _partial(target: Path) -> Path:
    """A name beside `target`, whose own may be as long as names can be."""
    return target.with_name(f".{secrets.token_hex(4)}.part")
