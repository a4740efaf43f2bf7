"""The parsers of all commands."""

import argparse
import functools

from streamer.cli.parser import build_parser


@functools.cache
def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its name."""
    actions = build_parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
