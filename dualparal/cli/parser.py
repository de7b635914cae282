"""What every command of the command line shares, and nothing that takes time to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

STOPPED = 130  # exit code after Ctrl-C


class Parser(argparse.ArgumentParser):
    """Takes --like-this for --like_this."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(normal(sys.argv[1:] if args is None else args), namespace)


def normal(arguments: Iterable[str]) -> list[str]:
    """The words of a command with --like-this as --like_this; values are left alone."""
    found = []
    for word in arguments:
        name, equals, value = word.partition("=")
        found.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word)
    return found


def complain(error: Exception | str, code: int) -> int:
    """Say what went wrong; returns the exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
