"""Every option says what it is for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from dualparal.bench import quality
from dualparal.cli import main as cli
from dualparal.ui import serve


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


PARSERS = [*parsers(cli.make_parser()), serve.parser(), quality.parser()]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_option_has_help(parser: argparse.ArgumentParser) -> None:
    silent = [
        action.option_strings or action.dest
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction | argparse._VersionAction)
        and (not action.help or action.help is argparse.SUPPRESS or len(action.help) < 4)
    ]
    assert not silent
    assert parser.format_help()
