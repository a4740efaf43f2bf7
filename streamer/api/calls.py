"""Call the library's functions: their keywords, and the events of their runs as tqdm bars, which the command line draws too.

A function's signature and docstring are completed when it is declared; its keywords are checked when it is called.
tqdm is imported when the first bar is needed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from streamer.errors import UsageError, printable
from streamer.events import Event, Monitor, warn
from streamer.options import Watched, declared
from streamer.units import plural

Function = TypeVar("Function", bound=Callable[..., Any])
Result_co = TypeVar("Result_co", covariant=True)

TYPES = {
    "Callable": "collections.abc", "Sequence": "collections.abc", "Executor": "concurrent.futures", "Path": "pathlib", "Literal": "typing",
    "LoraBLayout": "streamer.adapters.adapter_config", "FindingsOrPath": "streamer.output.job", "IOMode": "streamer.storage.checkpoint",
    "Findings": "streamer.detection.findings", "ProductDtype": "streamer.evaluation.evaluation", "RemoteMode": "streamer.remote.inputs",
    "Monitor": "streamer.events", "OnEvent": "streamer.events", "Selection": "streamer.json_types", "MethodName": "streamer.methods",
    "Coefficients": "streamer.methods.files", "InputMap": "streamer.methods.files", "MergedDtype": "streamer.output.record",
}  # fmt: skip
"""Module of each type that an option's annotation names; a function imports those of its own options when it is declared."""

ITEMS = {"detect": "matrix", "recompute": "matrix", "write": "tensor", "download": "file", "verify": "file",
         "generate": "token", "evaluate": "layer", "fit": "layer", "map": "layer"}  # fmt: skip
"""What `Event.items` counts, by stage."""

IN_BYTES = ("download", "verify", "write")
"""Stages whose `Event.total` is in bytes, unless it is the number of files."""

FULL = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
NARROW = "{desc}|{bar}| {elapsed}<{remaining}"
NO_BAR = "{desc} {elapsed}<{remaining}"
"""tqdm's formats, from the most columns to the fewest."""

BESIDE, SHORTEST, ADAPTER = 46, 10, 20
"""Columns of `FULL` without description and postfix, of the shortest useful name, and of the longest name of an adapter."""

ECHO = 2
"""Columns left free for the ^C of an interrupt, which would otherwise wrap and leave the bar behind."""


class Bars:
    """Draw the stages of a run, one bar at a time.

    Parameters
    ----------
    tqdm
        Makes a bar: a tqdm class with the options common to all bars.
    layout
        Returns the bar's attributes that depend on an event.
    """

    def __init__(self, tqdm: Callable[..., Any], layout: Callable[[Event], dict[str, Any]]) -> None:
        self._tqdm, self._layout = tqdm, layout
        self._event = Event("probe", "")
        self.bar: Any = None

    def __call__(self, event: Event) -> None:
        """Draw an event of a stage that counts."""
        ends = event.total > 0 and event.done >= event.total
        if self.bar is not None and (
            event.stage != self._event.stage or event.done < self._event.done
        ):
            self.bar.total, self.bar.leave = (
                None,
                False,
            )  # a nested stage begins, so the bar must not look failed
            self.close()
        if self.bar is None:
            if ends:
                return
            self._open(event)
        self._event = event
        self._lay_out()
        if event.total:  # a fit's total may grow; the bar keeps its own total
            self.bar.n = self.bar.total * event.done / event.total
        if ends:
            self.close()
        else:
            self.bar.update(0)

    def refresh(self) -> None:
        """Draw the bar again at the terminal's current width."""
        self._lay_out()
        self.bar.refresh()

    def close(self) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _open(self, event: Event) -> None:
        if event.stage in IN_BYTES and event.total != event.of:
            total, unit = event.total, {"unit": "B", "unit_scale": True}
        else:
            total, unit = event.of, {"unit": ITEMS.get(event.stage, "it")}
        done = total * event.done / event.total if event.total else 0
        self.bar = self._tqdm(total=total, initial=done, miniters=0, **unit, **self._layout(event))

    def _lay_out(self) -> None:
        for name, value in self._layout(self._event).items():
            setattr(self.bar, name, value)


def counts(event: Event, of: str = "/") -> str:
    """Write the number of items done, of all items, with their unit."""
    width = len(str(event.of))
    return f"{event.items:>{width}}{of}{event.of} {plural(ITEMS[event.stage])}"


def layout(event: Event, columns: int | None) -> dict[str, Any]:
    """Fit a bar to a terminal: if room is scarce, leave out the matrix's name first, then rate and share, the bar last."""
    if not event.of:
        return {"desc": f"{event.stage}: {printable(event.name)}", "bar_format": "{desc} {elapsed}"}
    desc, ncols = f"{event.stage} {counts(event)}", None if columns is None else columns - ECHO
    room = 24 if ncols is None else ncols - len(desc) - BESIDE  # more would wrap in a notebook
    narrow = NARROW if room + BESIDE >= len("|▌▌▌| 00:00<00:00") else NO_BAR
    postfix = _name(event, room) if room >= SHORTEST else ""
    return {
        "desc": desc,
        "bar_format": FULL if room >= 0 else narrow,
        "postfix": postfix,
        "ncols": ncols,
    }


def _name(event: Event, columns: int) -> str:
    """Shorten the names of adapter and matrix to fit, keeping the end of the matrix's name."""
    start = f"{event.adapter[:ADAPTER]}: " if event.adapter else ""
    name, room = event.name.removesuffix(".weight"), columns - len(start)
    return printable(
        start + (name if len(name) <= room else "…" + name[len(name) - room + 1 :].lstrip("."))
    )


def columns() -> int | None:
    """Return the number of columns if stderr is a terminal, else None."""
    try:
        return max(8, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    except (OSError, ValueError, AttributeError):
        return None


def in_notebook() -> bool:
    """Test whether this process is the kernel of a notebook, by the rule of `tqdm.auto`."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def watched(options: Watched) -> Iterator[Monitor]:
    """Make the monitor of a call in Python, and draw bars during the call if requested.

    Without a listener, warnings go through the `warnings` module.

    Raises
    ------
    UsageError
        If bars are requested together with a monitor.
    """
    monitor, progress = options.monitor, options.progress
    if progress and monitor is not None:
        raise UsageError(
            "progress: the monitor receives the events; give it an on_event, or omit one of the two"
        )
    if progress is None:
        progress = options.on_event is None and monitor is None and in_notebook()
    listener = options.on_event or warn
    if not progress:
        yield monitor or Monitor(listener)
        return
    from tqdm.auto import tqdm

    width = (lambda: None) if in_notebook() else columns
    bars = Bars(tqdm, lambda event: layout(event, width()))

    def show(event: Event) -> None:
        if event.stage in ("warning", "note"):
            with tqdm.external_write_mode(file=sys.stderr):
                listener(event)
        else:
            bars(event)
            listener(event)

    with contextlib.closing(bars):
        yield Monitor(show)


class Requested(Protocol[Result_co]):
    """A request that can run; it is made of options, which say how it is watched."""

    def run(self, monitor: Monitor) -> Result_co:
        """Run it."""


def call(request: Requested[Result_co]) -> Result_co:
    """Run a request as `watched` says, on the caller's executor, if there is one."""
    options: Any = request
    run = request.run
    if getattr(options, "executor", None) is not None:
        from streamer.workers import Workers

        run = functools.partial(options.run, workers=Workers.of(options.executor))
    with watched(options) as monitor:
        return run(monitor)


def _evaluated(annotation: str) -> Any:
    """Evaluate the type of an option."""
    names = TYPES.keys() & {*re.findall(r"\w+", annotation)}
    return eval(annotation, {name: getattr(import_module(TYPES[name]), name) for name in names})  # noqa: S307  # from `options`


ERRORS = """StreamerError
    Its class names the kind of error (see `streamer.errors`). Some classes are also Python's own: `ValueError` for options and inputs,
    `FileNotFoundError` for missing inputs, `FileExistsError` for an output that is not replaced."""


def explained(kind: type) -> Callable[[Function], Function]:
    """Add the options that a function accepts as ``**options`` to its signature and docstring; make it refuse others.

    A parameter that the function's docstring leaves out is explained as the option is, and errors as in `ERRORS`.

    Parameters
    ----------
    kind
        Class of the options.
    """
    options = {field.name: (field, option) for field, option, _ in declared(kind)}
    keywords = {
        flag: f"`{name}`" for name, (_, option) in options.items() for flag in option.names(name)
    }

    def text(name: str) -> str:
        field, option = options[name]
        words = f"{'False: ' if field.default is True else ''}{option.help(field.default)}. {option.detail}".strip()
        words = re.sub(r"--[a-z-]+", lambda flag: keywords.get(flag[0], flag[0]), words)
        return f"{name}\n" + textwrap.fill(
            words[0].upper() + words[1:], 136, initial_indent=" " * 4, subsequent_indent=" " * 4
        )

    def complete(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keyword_only = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            for name, (field, _) in options.items()
            if name not in signature.parameters
        ]
        names = [p.name for p in (*parameters, *keyword_only)]

        @functools.wraps(function)
        def checked(*args: Any, **keywords_given: Any) -> Any:
            for name in keywords_given.keys() - set(names):
                meant = "".join(
                    f"; did you mean {near!r}?"
                    for near in difflib.get_close_matches(name, names, 1)
                )
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}{meant}"
                )
            return function(*args, **keywords_given)

        typed = {name: kind for name, kind in function.__annotations__.items() if name != "options"}
        checked.__annotations__ = {
            **typed,
            **{p.name: _evaluated(p.annotation) for p in keyword_only},
        }
        if function.__doc__:  # -OO has none
            head, *tail = re.split(
                r"\n(?=(?:Returns|Yields)\n)", inspect.cleandoc(function.__doc__)
            )
            explained_names = {name for line in head.splitlines() for name in line.split(", ")}
            explanations = [text(name) for name in names if name not in explained_names]
            title = [] if "Raises\n" in function.__doc__ else ["", "Raises", "------"]
            checked.__doc__ = "\n".join([head.rstrip(), *explanations, "", *tail, *title, ERRORS])
        checked.__signature__ = signature.replace(parameters=[*parameters, *keyword_only])  # type: ignore[attr-defined]  # where inspect.signature looks for it
        return cast(Function, checked)

    return complete
