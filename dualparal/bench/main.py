"""`python -m dualparal bench`: which bench to run. Speed lives in `benchmarks/` of the source tree, quality in the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dualparal.bench import quality

USAGE = "usage: dualparal bench quality [--help]\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench named first in `argv`; returns the exit code."""
    arguments = list(sys.argv[2:] if argv is None else argv)
    if arguments and arguments[0] == "quality":
        return quality.main(arguments[1:])
    asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
    (sys.stdout if asked_for_help else sys.stderr).write(USAGE)
    return 0 if asked_for_help else 2
