"""Give the library's functions their keywords: in the signature, in the docstring, and when they are called."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar, cast

from streamer.options import REMOVED, declared

Function = TypeVar("Function", bound=Callable[..., Any])


def explained(kind: type) -> Callable[[Function], Function]:
    """Add the options that a function accepts as ``**options`` to its signature and docstring; make it refuse others.

    A parameter that the function's docstring leaves out is explained as the option is.

    Parameters
    ----------
    kind
        Class of the options.
    """
    options = {field.name: (field, option) for field, option, _ in declared(kind)}
    keywords = {flag: f"`{name}`" for name, (_, option) in options.items() for flag in option.names(name)}

    def text(name: str) -> str:
        field, option = options[name]
        words = f"{'False: ' if field.default is True else ''}{option.help(field.default)}. {option.detail}".strip()
        words = re.sub(r"--[a-z-]+", lambda flag: keywords.get(flag[0], flag[0]), words)
        return f"{name}\n" + textwrap.fill(
            words[0].upper() + words[1:], 136, initial_indent=" " * 4, subsequent_indent=" " * 4
        )

    def complete(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, (field, _) in options.items()
            if name not in signature.parameters
        ]
        names = [p.name for p in (*own, *more)]

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            if "scale" in given and "select" in names and "select" not in given:
                given["select"] = given.pop("scale")  # its name before 0.2
            for name in given.keys() - set(names):
                flag, command = f"--{name.replace('_', '-')}", function.__name__.partition("_")[0]
                if advice := REMOVED.get(flag) or REMOVED.get(f"{command} {flag}"):
                    raise TypeError(f"{function.__name__}(): {name} was removed: {advice}")
                meant = "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, names, 1))
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{meant}")
            return function(*args, **given)

        if function.__doc__:  # -OO has none
            head, *tail = re.split(r"\n(?=(?:Returns|Yields)\n)", inspect.cleandoc(function.__doc__))
            said = {name for line in head.splitlines() for name in line.split(", ")}
            rest = [text(name) for name in names if name not in said]
            checked.__doc__ = "\n".join([head.rstrip(), *rest, "", *tail])
        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]  # where inspect.signature looks for it
        return cast(Function, checked)

    return complete
