"""Run the requested command: stop at signals, and report events and errors as lines or JSON; heavy imports happen only inside commands."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NoReturn

from streamer.api import shown
from streamer.cli.parser import BadUsage, build_parser, named_as_option
from streamer.cli.terminal import (
    ProgressLines,
    Result,
    presence,
    say,
    screen,
    silence,
    verification_text,
    write_line,
)
from streamer.errors import (
    StorageError,
    StreamerError,
    UsageError,
    VerificationError,
    advice,
    one_line,
    printable,
)
from streamer.events import Event, Monitor
from streamer.options import Threads, WorkerOptions

if TYPE_CHECKING:
    from streamer.api.records import ErrorEntry


REQUESTS = {
    "inspect": "records.InspectRequest",
    "detect": "intruders.DetectRequest",
    "mitigate": "intruders.OutputRequest",
    "merge": "intruders.OutputRequest",
    "report": "report.ReportRequest",
    "verify": "verification.VerifyRequest",
    "evaluate": "texts.EvaluateRequest",
    "map": "texts.MapRequest",
    "repair": "texts.RepairRequest",
}
"""Classes of requests in `api`; their modules are imported when the command runs."""


SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP's threads wait; if none is set, idle ones sleep.

Spinning threads occupy cores that other work needs, and then wait for each other; `tools/bench_shared.py` measures this.
"""


def run_command(args: argparse.Namespace, monitor: Monitor) -> Result:
    """Run the command, or forecast it with `--dry-run`."""
    if args.command == "demo":
        from streamer.cli.demo import demo_text, run_demo

        def step(words: list[str]) -> Result:
            return run_command(build_parser(words[0]).parse_args(words), monitor)

        outcome = run_demo(args.output, step)
        return {**outcome}, demo_text(outcome, screen(args.all, args.legend))
    module, kind = REQUESTS[args.command].split(".")
    request = requested(getattr(import_module(f"streamer.api.{module}"), kind), args)
    run = request.forecast if getattr(args, "dry_run", False) else request.run
    if "workers" in args:
        from streamer.api.executors import open_workers

        outcome = run(monitor, open_workers(args.workers, args.executor, args.threads, monitor))
    else:
        outcome = run(monitor)
    if args.command == "verify":  # needs no torch, which tables import
        return {**outcome}, verification_text(outcome)
    from streamer.cli.tables import result

    return result(outcome, args, monitor)


def requested(kind: Any, args: argparse.Namespace) -> Any:
    """Make a request, or other options, from the command line; a base or adapter alone in its list is given without the list."""
    values = {}
    for field in fields(kind):
        option = field.metadata.get("option")
        if field.name in args and not (option and option.where == "keyword"):
            value = getattr(args, field.name)
            match value:
                case [alone] if field.name in ("base", "adapter"):
                    value = alone
            values[field.name] = value
    return kind(**values)


@contextlib.contextmanager
def stop_on_signals(
    monitor: Monitor, tell: Callable[[str], None], close: Callable[[], None]
) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an announced stop at the next safe point, and the second into an immediate exit.

    A thread waits for the signals: Python runs handlers only in the main thread, which may be inside LAPACK for a minute.

    Parameters
    ----------
    tell
        Prints a line on stderr.
    close
        Removes the bar.
    """
    watched = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def watch() -> None:
        first = signal.sigwait(watched)
        monitor.request_stop(first)
        tell(
            f"streamer: signal {int(first)}: stopping at the next safe point; once more to stop at once"
        )
        second = signal.sigwait(watched)
        closing = threading.Thread(target=close, daemon=True, name="streamer close")
        closing.start()
        closing.join(0.5)  # an unresponsive terminal must not keep the process alive
        os._exit(128 + second)

    threading.Thread(target=watch, daemon=True, name="streamer signals").start()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


ERROR_SCHEMA: Final = "streamer.error/1"


def error_entry(
    kind: str, exit_code: int, message: str, path: str | None = None, paths: Collection[str] = ()
) -> ErrorEntry:
    """Describe one error.

    Parameters
    ----------
    kind
        Name of the exception's class.
    message
        The line printed to stderr, without the program's name.
    path
        The file or directory at fault; by default the path that the message begins with, if any.
    paths
        Paths given to the command; a message may begin with one even if it does not exist.
    """
    # A message begins with the location of the error, which may also be an option.
    head, colon, _ = message.partition(": ")
    if path is None and colon and (head in paths or os.sep in head or os.path.lexists(head)):
        path = head
    return {"kind": kind, "exit_code": exit_code, "message": message, "path": path}


def _errors(error: ErrorEntry) -> dict[str, Any]:
    """Make the object that `--json` prints for an error."""
    return {"schema": ERROR_SCHEMA, "errors": [error]}


EVENT_SCHEMA = "streamer.event/1"


class JsonEvents:
    """Writes events, and Python's warnings, as complete lines of JSON."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._show = warnings.showwarning
        warnings.showwarning = lambda message, *_args, **_more: self.say(
            "warning", message=str(message)
        )

    def __call__(self, event: Event) -> None:
        """Write an event."""
        if event.stage in ("warning", "note"):
            self.say(event.stage, message=event.name)
        else:
            self.say("progress", **asdict(event))

    def tell(self, text: str) -> None:
        """Write a message that is not an event of the library."""
        self.say("note", message=text.removeprefix("streamer: "))

    def error(self, error: ErrorEntry) -> None:
        """Write the error that ended the run, as described by `error_entry`."""
        self.say("error", **error)

    def finish(self, summary: str) -> None:
        """Write that the command has finished."""
        self.say("done", message=summary)

    def close(self) -> None:
        """Restore Python's own display of warnings."""
        warnings.showwarning = self._show

    def say(self, event: str, **more: Any) -> None:
        """Write one line."""
        seconds = round(time.monotonic() - self._began, 3)
        write_line(json.dumps({"schema": EVENT_SCHEMA, "event": event, "seconds": seconds, **more}))


def run(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    _open_missing_streams()
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (
        out.errors == "strict" or "utf" not in out.encoding.lower()
    ):
        out.reconfigure(errors="backslashreplace")  # as stderr's
    if not any(name in os.environ for name in SPINNING):  # before torch is imported
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if any(arg == "" or re.fullmatch("--?[a-z-]+=", arg) for arg in arguments):
            raise BadUsage(
                "an argument is empty; is a variable of the shell unset? Pass '.' for the current directory"
            )
        args = build_parser(*arguments[:1]).parse_args(arguments)
    except BadUsage as e:  # report in the format that the readable arguments ask for
        progress = JsonEvents() if "--json-events" in arguments else ProgressLines("none")
        error = error_entry("UsageError", UsageError.exit_code, one_line(e.message))
        _tell([error], _errors(error), "--json" in arguments, progress)
        progress.close()
        raise
    dry = " --dry-run" if getattr(args, "dry_run", False) else ""
    if args.json_events:
        progress = JsonEvents()
    else:
        progress = ProgressLines(args.progress, args.quiet, f"{args.command}{dry}")
    try:
        _run(args, progress)
    except VerificationError as e:
        differences = e.verification["differences"] or [{"message": str(e), "file": args.output}]
        errors = [
            error_entry("VerificationError", e.exit_code, one_line(d["message"]), d["file"])
            for d in differences
        ]
        _tell(errors, e.verification, args.json, progress)
        return e.exit_code
    except Exception as e:  # with --json, an error of any kind is printed as JSON too
        described = _described(e, _paths(args))
        error = described or error_entry(type(e).__name__, 1, str(e))
        if lines := getattr(e, "__notes__", []):
            error["lines"] = lines
        _tell([error] if described or args.json_events else [], _errors(error), args.json, progress)
        for line in error.get("lines", []):
            progress.tell(line)
        if described is None:  # our own bug: print its traceback
            raise
        return error["exit_code"]
    finally:
        progress.close()
    return 0


def _run(args: argparse.Namespace, progress: ProgressLines | JsonEvents) -> None:
    """Run the command; print its result on stdout and the last line on stderr."""
    monitor = Monitor(progress)
    try:
        os.getcwd()
    except OSError as e:  # MKL aborts
        raise StorageError(f"the current directory: {e.strerror}; change to one that exists") from e
    prints = args.json or not args.quiet
    if prints and sys.stdout is None:
        raise StorageError(
            "stdout: is closed, and the result goes there; redirect it to a file or /dev/null, or pass --quiet"
        )
    with stop_on_signals(monitor, progress.tell, progress.close):
        try:
            _ = requested(Threads, args), requested(WorkerOptions, args)  # checks them
            if args.command != "verify":
                from streamer.api.executors import set_threads

                elsewhere = getattr(args, "executor", None) is not None
                set_threads(getattr(args, "threads", None), monitor, elsewhere)
            else:  # hashing needs no torch, and numpy's idle threads spin: one thread is faster if other processes run
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            tree, text = run_command(args, monitor)
        finally:
            progress.close()
    if prints and args.json:
        _print(json.dumps(tree, indent=1))
    elif prints:
        _print("\n".join(map(printable, text.split("\n"))))
    progress.finish(presence(tree))


def _paths(args: argparse.Namespace) -> list[str]:
    """Collect the paths given to the command, including addresses as they are printed."""
    names = ("base", "adapter", "output", "findings", "general", "task")
    values = [getattr(args, name, None) for name in names]
    lists = (value if isinstance(value, list) else [value] for value in values)
    paths = [path for path in chain.from_iterable(lists) if path]
    with contextlib.suppress(UsageError):  # keep an invalid address as given
        paths += [shown(path) for path in paths]
    return paths


def _described(e: Exception, paths: Sequence[str]) -> ErrorEntry | None:
    """Describe an expected error of a command that was given these paths; return None for an unexpected one."""
    kind = type(e).__name__
    if isinstance(e, StreamerError):
        message = str(e)
        subject, _, _ = message.partition(": ")
        if isinstance(e, UsageError) and subject not in paths:  # a path may be named like an option
            message = named_as_option(message)
        return error_entry(kind, e.exit_code, message, getattr(e, "filename", None), paths)
    if isinstance(e, OSError):
        code = UsageError.exit_code if e.errno == errno.ENAMETOOLONG else StorageError.exit_code
        where = None if e.filename is None else os.fsdecode(e.filename)
        message = one_line(f"{where or 'I/O'}: {e.strerror or e}; {advice(e)}")
        return error_entry(kind, code, message, where)
    if isinstance(e, MemoryError):
        text = "out of memory; use fewer threads or a machine with more, then run the same command again"
        return error_entry(kind, 1, text)
    return None


def _tell(
    errors: Sequence[ErrorEntry],
    tree: Mapping[str, Any],
    as_json: bool,
    progress: ProgressLines | JsonEvents,
) -> None:
    """Report errors, each in one line on stderr, and with `--json` print an object on stdout."""
    if as_json and sys.stdout is not None:
        with contextlib.suppress(StorageError):  # stdout is what failed
            _print(json.dumps(tree, indent=1))
    for error in errors:
        progress.error(error)


def _open_missing_streams() -> None:
    """Open the null device for closed standard streams; otherwise a file could get such a number and receive printed text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number


def _print(text: str = "") -> None:
    """Print a result on stdout, or flush earlier output.

    Raises
    ------
    StorageError
        If it cannot be written; a reader that closed the pipe is not an error.
    """
    if sys.stdout is None:
        return
    try:
        print(text, end="\n" if text else "", flush=True)
    except OSError as e:
        silence(sys.stdout)
        if not isinstance(e, BrokenPipeError):
            message = f"stdout: {e.strerror or e}; the result could not be printed, the files that were written are complete"
            raise StorageError(message) from e


def main() -> NoReturn:
    """Run the `streamer` command and exit with its code."""
    try:
        code = run()
    except SystemExit:  # from the parser, after help or a wrong option
        try:
            _print()
        except StorageError as e:
            say(f"streamer: {e}")
            sys.exit(e.exit_code)
        raise
    sys.exit(code)
