"""The parser's help: its examples and its width."""

from __future__ import annotations

import pytest


def test_the_examples_in_the_help_are_understood() -> None:
    import shlex

    from streamer.cli.help import EXAMPLES
    from streamer.cli.parser import build_parser

    for command, text in EXAMPLES.items():
        given = [line.split("|")[0] for line in text.splitlines() if line.startswith("  streamer")]
        assert given, command
        for line in given:
            assert build_parser().parse_args(shlex.split(line)[1:]).command == command


def test_the_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from streamer.cli.help import EXAMPLES
    from streamer.cli.parser import build_parser

    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert commands.keys() == EXAMPLES.keys()
    for one in (parser, *commands.values()):
        long = [line for line in one.format_help().splitlines() if len(line) > 80]
        assert not long, long
        assert " _" not in one.format_help()
