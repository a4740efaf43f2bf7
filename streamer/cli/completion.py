"""Generate shell completion from the parser with shtab, which is imported only when a script is requested."""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Generate a shell's completion script.

    Parameters
    ----------
    shell
        ``bash``, ``zsh`` or ``tcsh``.

    Raises
    ------
    ImportError
        If shtab is not installed.
    """
    import shtab

    completes = {
        "BASE": shtab.FILE,
        "ADAPTER": shtab.DIRECTORY,
        "DIR": shtab.DIRECTORY,
        "FILE": shtab.FILE,
        "FINDINGS": shtab.FILE,
        "EVALUATION": shtab.FILE,
        "PAGE": shtab.FILE,
    }
    for action in _actions(parser):
        if action.metavar in completes:
            action.complete = completes[action.metavar]  # type: ignore[attr-defined]  # shtab reads this attribute
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                yield from _actions(sub)
