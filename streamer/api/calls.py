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
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast, get_type_hints

from streamer.errors import UsageError, printable
from streamer.events import Event, Monitor, warn
from streamer.options import Watched, declared
from streamer.units import plural

Function = TypeVar("Function", bound=Callable[..., Any])
Result_co = TypeVar("Result_co", covariant=True)

TYPES = {
    "Executor": "concurrent.futures",
    "Literal": "typing",
    "Selection": "streamer.json_types",
    "Evaluation": "streamer.evaluation.evaluation",
    "Findings": "streamer.detection.findings",
    "FindingsOrPath": "streamer.output.opening",
    "IOMode": "streamer.storage.checkpoint",
    "LoraBLayout": "streamer.adapters.adapter_config",
    "MergedDtype": "streamer.output.record",
    "ProductDtype": "streamer.measuring.facts",
    "RemoteMode": "streamer.remote.inputs",
    "Coefficients": "streamer.methods.files",
    "InputMap": "streamer.methods.files",
    "MethodName": "streamer.methods",
}
"""Module of each type that options name and `streamer.options` imports only for type checkers."""


class _Types(dict[str, Any]):
    """Imports of `TYPES`, each when an option names it: `verify` needs no torch."""

    def __missing__(self, name: str) -> Any:
        return getattr(import_module(TYPES[name]), name)


ITEMS = {
    "detect": "matrix",
    "recompute": "matrix",
    "write": "tensor",
    "download": "file",
    "verify": "file",
    "generate": "token",
    "evaluate": "layer",
    "fit": "layer",
    "map": "layer",
}
"""What `Event.items` counts, by stage."""

IN_BYTES = ("download", "verify", "write")
"""Stages whose `Event.total` is in bytes, unless it is the number of files."""

FULL = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
BAR_AND_TIME = "{desc}|{bar}| {elapsed}<{remaining}"
NO_BAR = "{desc} {elapsed}<{remaining}"
"""tqdm's formats, from the most columns to the fewest."""

COLUMNS_BESIDE = 46
"""Columns of `FULL` without description and postfix."""

SHORTEST = 10
"""Columns of the shortest useful name."""

ADAPTER_COLUMNS = 20
"""Columns of the longest name of an adapter."""

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
        self._tqdm = tqdm
        self._layout = layout
        self._event = Event("probe", "")
        self.bar: Any = None

    def __call__(self, event: Event) -> None:
        """Draw an event of a stage that counts."""
        ends = event.total > 0 and event.done >= event.total
        if self.bar is not None and (
            event.stage != self._event.stage or event.done < self._event.done
        ):
            # A nested stage begins, so the bar must not look failed.
            self.bar.total = None
            self.bar.leave = False
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
        in_bytes = event.stage in IN_BYTES and event.total != event.of
        total = event.total if in_bytes else event.of
        self.bar = self._tqdm(
            total=total,
            initial=total * event.done / event.total if event.total else 0,
            miniters=0,
            unit="B" if in_bytes else ITEMS.get(event.stage, "it"),
            unit_scale=in_bytes,
            **self._layout(event),
        )

    def _lay_out(self) -> None:
        for name, value in self._layout(self._event).items():
            setattr(self.bar, name, value)


def counts(event: Event, of: str = "/") -> str:
    """Write the number of items done, of all items, with their unit."""
    width = len(str(event.of))
    return f"{event.items:>{width}}{of}{event.of} {plural(ITEMS[event.stage])}"


def bar_layout(event: Event, columns: int | None) -> dict[str, Any]:
    """Fit a bar to a terminal: if room is scarce, leave out the matrix's name first, then rate and share, the bar last."""
    if not event.of:
        return {"desc": f"{event.stage}: {printable(event.name)}", "bar_format": "{desc} {elapsed}"}
    desc = f"{event.stage} {counts(event)}"
    ncols = None if columns is None else columns - ECHO
    room = (
        24 if ncols is None else ncols - len(desc) - COLUMNS_BESIDE
    )  # more would wrap in a notebook
    if room >= 0:
        bar_format = FULL
    elif room + COLUMNS_BESIDE >= len("|▌▌▌| 00:00<00:00"):
        bar_format = BAR_AND_TIME
    else:
        bar_format = NO_BAR
    name = _name(event, room) if room >= SHORTEST else ""
    return {"desc": desc, "bar_format": bar_format, "postfix": name, "ncols": ncols}


def _name(event: Event, columns: int) -> str:
    """Shorten the names of adapter and matrix to fit, keeping the end of the matrix's name."""
    start = f"{event.adapter[:ADAPTER_COLUMNS]}: " if event.adapter else ""
    name = event.name.removesuffix(".weight")
    room = columns - len(start)
    if len(name) > room:
        name = "…" + name[len(name) - room + 1 :].lstrip(".")
    return printable(start + name)


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
    monitor = options.monitor
    progress = options.progress
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
    bars = Bars(tqdm, lambda event: bar_layout(event, width()))

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
    fields = {field.name: field for field, _, _ in declared(kind)}

    def complete(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = {
            name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD
        }
        keywords = {
            name: inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            for name, field in fields.items()
            if name not in parameters
        }
        parameters |= keywords

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            for name in given.keys() - parameters.keys():
                near = difflib.get_close_matches(name, parameters, 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}{meant}"
                )
            return function(*args, **given)

        types = get_type_hints(kind, localns=_Types())
        checked.__annotations__ = {name: types[name] for name in keywords} | {
            name: typed for name, typed in function.__annotations__.items() if name != "options"
        }
        if function.__doc__:  # -OO has none
            checked.__doc__ = _documented(function.__doc__, kind, parameters)
        checked.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]  # where inspect.signature looks for it
        return cast(Function, checked)

    return complete


def _documented(doc: str, kind: type, parameters: Iterable[str]) -> str:
    """Complete a docstring by the parameters that it leaves out, and by the errors."""
    head, *tail = re.split(r"\n(?=(?:Returns|Yields)\n)", inspect.cleandoc(doc))
    explained_names = {name for line in head.splitlines() for name in line.split(", ")}
    texts = _keyword_texts(kind)
    added = [texts[name] for name in parameters if name not in explained_names]
    title = [] if "Raises\n" in doc else ["", "Raises", "------"]
    return "\n".join([head.rstrip(), *added, "", *tail, *title, ERRORS])


def _keyword_texts(kind: type) -> dict[str, str]:
    """Explain each option as a docstring does, naming keywords in place of flags."""
    options = [(field.name, field.default, option) for field, option, _ in declared(kind)]
    keywords = {flag: f"`{name}`" for name, _, option in options for flag in option.names(name)}
    texts = {}
    for name, default, option in options:
        start = "False: " if default is True else ""
        words = f"{start}{option.help(default)}. {option.detail}".strip()
        words = re.sub(r"--[a-z-]+", lambda flag: keywords.get(flag[0], flag[0]), words)
        indent = " " * 4
        text = textwrap.fill(
            words[0].upper() + words[1:], 136, initial_indent=indent, subsequent_indent=indent
        )
        texts[name] = f"{name}\n{text}"
    return texts
