"""The parsers of all commands."""

import argparse

from streamer.cli.parser import build_parser


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its name."""
    actions = build_parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
