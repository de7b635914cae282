"""The command line: `python -m dualparal COMMAND`. Each command imports, and makes the flags of, itself alone."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dualparal import __version__
from dualparal.cli.parser import STOPPED, Parser, complain
from dualparal.errors import DualParalError, PresetError, RequestError
from dualparal.streams import run_safely

# By name: its line in the list, and the function that adds its flags.
COMMANDS = {
    "generate": ("make one video from a prompt, or those of a --batch", "batch:add_generate"),
    "plan": ("what a job needs and how long it takes, before any download", "plan:add_plan"),
    "resume": ("go on with a job that was interrupted, stopped or failed", "generate:add_resume"),
    "jobs": ("list the jobs of an outputs folder, newest first; stop or delete some", "jobs:add_jobs"),
    "serve": ("the page and the API (see serve --help)", None),
    "bench": ("measure quality or speed (see bench --help)", None),
    "presets": ("list the presets", "tools:add_presets"),
    "info": ("print the settings stored in a video made here", "tools:add_info"),
    "tiny": ("write a small random Wan checkpoint in the hub's layout", "tools:add_tiny"),
}
HANDED_ON = {"serve": "dualparal.ui.serve:main", "bench": "dualparal.bench.main:main"}  # they read their words themselves
MAKE_FILES = {"generate", "resume", *HANDED_ON}  # what they print is not what they are for


def program(argv: Sequence[str] | None = None) -> int:
    """`main` as a process of its own, whatever its standard streams are like."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_safely(lambda: main(arguments), is_answer=not MAKE_FILES.intersection(arguments[:1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never lets an error of ours out as a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in HANDED_ON:
            return int(_find(HANDED_ON[arguments[0]])(arguments[1:]) or 0)
        options = make_parser(arguments[:1]).parse_args(arguments)
        _set_up_logs(options)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except (RequestError, PresetError) as error:
        return complain(error, 2)
    except DualParalError as error:
        return complain(error, 1)
    except OSError as error:  # a file that somebody else has closed off, removed, filled up
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return complain(f"{name}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return STOPPED


def make_parser(asked: Sequence[str] = tuple(COMMANDS)) -> Parser:
    """The parser of the command line, with the flags of the commands `asked` for; the others are only listed."""
    parser = Parser(prog="dualparal", description="Minute-long videos with Wan on several GPUs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (line, adds_flags) in COMMANDS.items():
        command = commands.add_parser(name, help=line, add_help=name not in HANDED_ON)
        if name in asked and adds_flags:
            _find(f"dualparal.cli.{adds_flags}")(command)
    return parser


def _find(name: str) -> Callable[..., Any]:
    """A function by "module:name"."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _set_up_logs(options: argparse.Namespace) -> None:
    from dualparal.hosts.torchrun import find_team
    from dualparal.logs import set_up_logs

    name = team.name if (team := find_team()) else "front end"
    set_up_logs(getattr(options, "verbose", False), getattr(options, "log_json", False), worker=name)
