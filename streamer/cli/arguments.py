"""Parse arguments and option values; report an error in one line, with a suggestion."""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from streamer.api.choices import REMOVED
from streamer.units import parse_size, quoted


class BadUsage(SystemExit):
    """Arguments that the parser does not understand; the exit code is 2.

    Attributes
    ----------
    message
        The error and what to do, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Parser(argparse.ArgumentParser):
    """Parser that raises `BadUsage` and accepts no abbreviations, because a new option could break them."""

    def __init__(self, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": raw, **options})

    def error(self, message: str) -> NoReturn:
        """Raise `BadUsage`."""
        message = message.removeprefix("argument ")
        raise BadUsage(message if "did you mean" in message else f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but first refuse unknown options: argparse would report a missing argument for a misspelt option."""
        own = args or () if self._subparsers is None else takewhile(lambda arg: arg.startswith("-"), args or ())
        for arg in takewhile(lambda arg: arg != "--", own):
            name = arg.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                if advice := REMOVED.get(name) or REMOVED.get(f"{self.prog.rpartition(' ')[2]} {name}"):
                    raise BadUsage(f"{name} was removed: {advice}")
                self.error(f"unknown option {quoted(name)}{_closest(name, self._option_string_actions)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error(f"{'unknown option' if rest[0].startswith('-') else 'unexpected argument'} {quoted(rest[0])}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = _closest(str(value), choices)
            raise argparse.ArgumentError(action, f"expected one of {', '.join(choices)}, found {quoted(value)}{near}")


def _closest(given: str, names: Iterable[str]) -> str:
    """Suggest the closest name, if one is close."""
    by_letters = {name.strip("-"): name for name in names}
    close = difflib.get_close_matches(given.strip("-"), by_letters, n=1)
    return f"; did you mean {by_letters[close[0]]}?" if close else ""


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        meant = ""
        with contextlib.suppress(ValueError):
            share = float(text.removesuffix("%").replace(",", ".")) / (100 if text.endswith("%") else 1)
            meant = f"; did you mean {share:g}?"
        raise argparse.ArgumentTypeError(f"expected a number like 0.75, found {quoted(text)}{meant}") from None


def numbers(text: str) -> Sequence[float]:
    """Read comma-separated numbers."""
    return tuple(number(part) for part in text.split(","))


def integer(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {quoted(text)}") from None


def top_k(text: str, expected: str = "a count like 10 or a share like 0.1") -> int | float:
    """Read a count (integer) or a share (decimal number)."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {quoted(text)}") from None


def rank(text: str) -> int | float:
    """Read a rank or a share of the energy."""
    return top_k(text, "a rank like 16 or a share like 0.95")


def sample(text: str) -> int | str:
    """Read how many matrices to recompute."""
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a count from 1 or 'all', found {quoted(text)}")
    return int(text)


def path(text: str) -> str | None:
    """Read a path; an empty one, for example from an unset shell variable, gives None."""
    return text or None


def size(text: str) -> int:
    """Read a size like 4G."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
