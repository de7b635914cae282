"""The command line: generate, serve, resume, jobs, plan, presets, info, tiny, bench.

Exit codes: 0 done, 1 failed, 2 wrong usage (also a value a model cannot take), 130 stopped. The authors' flag names all work,
with diffusers' names beside them; underscores and dashes are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualparal import __version__
from dualparal.cli_flags import add_engine_flags, add_request_flags, make_engine
from dualparal.cli_jobs import add_jobs_command
from dualparal.cli_plan import add_plan_command
from dualparal.cli_progress import follow
from dualparal.errors import DualParalError, JobCancelled, OutputError, PresetError, RequestError
from dualparal.events import Finished
from dualparal.presets import load_presets
from dualparal.request import GenerationRequest
from dualparal.runtime.claim import is_claimed
from dualparal.runtime.journal import JobFolder, check_job_id, find_job, list_jobs, new_job_id, outputs_folder
from dualparal.runtime.logs import set_up_logs
from dualparal.runtime.torchrun import find_team

STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never lets an error of ours out as a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    handed_on = {"serve": "dualparal.ui.serve:main", "bench": "dualparal.bench:main"}
    try:
        if arguments and arguments[0] in handed_on:
            module, _, function = handed_on[arguments[0]].partition(":")
            return int(getattr(importlib.import_module(module), function)(arguments[1:]) or 0)
        options = _parser().parse_args([_with_underscores(argument) for argument in arguments])
        name = team.name if (team := find_team()) else "front end"
        set_up_logs(getattr(options, "verbose", False), getattr(options, "log_json", False), worker=name)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except (RequestError, PresetError) as error:
        return _complain(error, 2)
    except DualParalError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return STOPPED


def _complain(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _with_underscores(argument: str) -> str:
    """--like-this is --like_this; values are left alone."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dualparal", description="Minute-long videos with Wan on several GPUs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make one video from a prompt")
    add_request_flags(generate)
    add_engine_flags(generate)
    generate.add_argument("--save_file", type=Path, metavar="MP4", help="also copy the finished video here")
    generate.add_argument("--export_image", action="store_true", help="also write every frame as PNG")
    generate.add_argument(
        "--baseline", choices=("wan",), help="make it with diffusers' own WanPipeline on one device instead, to compare"
    )
    generate.add_argument("--job_id", help="id of the job and name of its folder (default: drawn)")
    generate.set_defaults(run=_generate)

    add_plan_command(commands, add_request_flags)

    resume = commands.add_parser("resume", help="go on with a job that was interrupted, stopped or failed")
    resume.add_argument("job", help="the job's id, or 'last' for the newest unfinished one")
    resume.add_argument("--save_file", type=Path, metavar="MP4", help="also copy the finished video here")
    add_engine_flags(resume)
    resume.set_defaults(run=_resume)

    add_jobs_command(commands)
    commands.add_parser("serve", help="the page and the API (see serve --help)", add_help=False)
    commands.add_parser("bench", help="measure quality or speed (see bench --help)", add_help=False)

    presets = commands.add_parser("presets", help="list the presets")
    presets.add_argument("--presets_folder", type=Path, help="also read this folder")
    presets.add_argument("--check", action="store_true", help="ask the hub whether each model is there at the pinned commit")
    presets.set_defaults(run=_presets)

    info = commands.add_parser("info", help="print the settings stored in a video made here")
    info.add_argument("video", type=Path)
    info.set_defaults(run=_info)

    tiny = commands.add_parser("tiny", help="write a small random Wan checkpoint in the hub's layout")
    tiny.add_argument("folder", type=Path)
    tiny.add_argument("--num_experts", type=int, choices=(1, 2), default=1)
    tiny.add_argument("--num_layers", type=int, default=4)
    tiny.add_argument("--num_heads", type=int, default=2)
    tiny.add_argument("--head_dim", type=int, default=12)
    tiny.add_argument("--ffn_dim", type=int, default=48)
    tiny.add_argument("--max_shard_size", default="10GB", help="split the DiT over files of this size, e.g. 20KB")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_tiny)
    return parser


def _generate(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in GenerationRequest.model_fields}
    request = GenerationRequest(**{name: value for name, value in given.items() if value is not None})
    engine = make_engine(options)
    if engine.team and not engine.team.is_front_end:
        return int(engine.host())
    request = engine.resolve(request)
    if options.save_file:
        _check_writable(options.save_file)
    job_id = check_job_id(options.job_id) if options.job_id else new_job_id()
    print(f"job {job_id}", flush=True)
    if options.baseline:
        return _baseline(engine, request, job_id, options)
    with _sigterm_as_ctrl_c(), contextlib.closing(engine.start(wait=False)):
        job = engine.submit(request, export_images=options.export_image, job_id=job_id)
        return finish_job(engine, job, options.save_file)


def _baseline(engine: Any, request: GenerationRequest, job_id: str, options: argparse.Namespace) -> int:
    from dualparal.cli_baseline import run_baseline_job

    try:
        with _sigterm_as_ctrl_c():
            result = run_baseline_job(
                engine, request, job_id, device=options.device, text_encoder=engine.text_encoder,
                export_images=options.export_image,
            )  # fmt: skip
    except JobCancelled as stop:
        print(stop, file=sys.stderr, flush=True)
        return STOPPED
    return _show_result(result, request.seed, options.save_file)


def _resume(options: argparse.Namespace) -> int:
    outputs = outputs_folder(options.outputs)
    if options.job == "last":
        folder = next((job for job in list_jobs(outputs) if _may_go_on(job)), None)
        if folder is None:
            raise RequestError(f"there is no unfinished job in {outputs}", "job")
    else:
        folder = find_job(outputs, options.job)
    record = folder.record()
    if not options.model_id and not options.preset:
        options.model_id = record.get("model")
    options.dtype = options.dtype or record.get("dtype")
    options.threads = options.threads or record.get("threads")
    options.lora = options.lora or record.get("loras", [])
    options.attention = options.attention or record.get("attention")
    options.compile = options.compile or bool(record.get("compile"))
    options.quantization = options.quantization or record.get("quantization")
    options.vae_dtype = options.vae_dtype or record.get("vae_dtype")
    engine = make_engine(options)
    if options.save_file:
        _check_writable(options.save_file)
    print(f"job {folder.job_id}", flush=True)
    with _sigterm_as_ctrl_c(), contextlib.closing(engine.start(wait=False)):
        return finish_job(engine, engine.resume(folder.job_id), options.save_file)


def _may_go_on(job: JobFolder) -> bool:
    """Whether `resume last` may mean this job."""
    try:
        is_over = isinstance(job.final_event(), Finished) or job.record().get("baseline") or job.record().get("has_tensors")
    except DualParalError as error:  # a power cut may leave a job unreadable
        print(f"left out: {error}", file=sys.stderr, flush=True)
        return False
    return not is_over and not is_claimed(job)


def finish_job(engine: Any, job: Any, save_file: Path | None) -> int:
    """Follow a job to its end on the terminal; Ctrl-C stops it and keeps the finished part. Returns the exit code."""
    try:
        follow(engine, job)
    except KeyboardInterrupt:
        print("stopping; Ctrl-C again to quit at once", file=sys.stderr, flush=True)
        job.cancel()
    try:
        result = job.result()
    except JobCancelled as stop:
        print(f"{stop}" + (f"; finished part: {stop.path}" if stop.path else ""), file=sys.stderr, flush=True)
        if stop.path and save_file:
            _copy(Path(stop.path), save_file)
        return STOPPED
    return _show_result(result, job.request.seed, save_file)


def _show_result(result: Any, seed: int | None, save_file: Path | None) -> int:
    path = Path(result.path)
    if save_file:
        _copy(path, save_file)
        path = save_file
    times = ", ".join(f"{name.removesuffix('_s')} {seconds:.1f} s" for name, seconds in result.timings.items())
    print(f"{path}: {result.num_frames} frames, seed {seed}; {times}", flush=True)
    return 0


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Any:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_writable(target: Path) -> None:
    """Find out before the run, not after it, that a video cannot be put where it is wanted."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another --save_file") from None


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{target} could not be written: {error.strerror}; the video is in {source}") from None


def _presets(options: argparse.Namespace) -> int:
    for name, preset in load_presets(options.presets_folder).items():
        print(f"{name:24} {preset.title}\n{'':24} {preset.model}; {preset.width}x{preset.height}, {preset.seconds:g} s, "
              f"{preset.num_inference_steps} steps\n{'':24} {preset.hardware}")  # fmt: skip
    return _check_presets(options.presets_folder) if options.check else 0


def _check_presets(folder: Path | None) -> int:
    from dualparal.model.hub import check_revision

    pins = {(preset.model, preset.revision) for preset in load_presets(folder).values() if preset.model.count("/") == 1}
    code = 0
    for model, revision in sorted(pins, key=str):
        try:
            print(check_revision(model, revision), flush=True)
        except DualParalError as error:
            code = _complain(error, 1)
    return code


def _info(options: argparse.Namespace) -> int:
    from dualparal.media.metadata import format_info

    print(format_info(options.video))
    return 0


def _tiny(options: argparse.Namespace) -> int:
    from dualparal.model.tiny import write_tiny_checkpoint

    values = {name: value for name, value in vars(options).items() if name not in ("run", "folder")}
    print(write_tiny_checkpoint(options.folder, **values))
    return 0
