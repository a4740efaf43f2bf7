"""Entry point of the command: runs what was asked for, turns errors into one line and an exit code. Nothing heavy is imported before."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from streamer.cli.commands import COMMANDS
from streamer.cli.errors_json import error_entry, errors_object
from streamer.cli.json_events import JsonEvents
from streamer.cli.parser import BadUsage, build_parser
from streamer.cli.progress import Progress
from streamer.cli.signals import stop_on_signals
from streamer.errors import StorageError, StreamerError, UsageError
from streamer.events import Monitor


def run(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except BadUsage as e:
        _refuse(e, sys.argv[1:] if argv is None else argv)
        raise
    events = JsonEvents() if args.json_events else None
    progress = events or Progress(args.quiet)
    try:
        _run(args, progress, events)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone; that is no fault
    except Exception as e:
        error = _described(e)
        if error is None:  # a fault of ours: its traceback is printed as it goes up
            error = error_entry(type(e).__name__, 1, str(e))
            _tell(error, args.json, events)
            raise
        _tell(error, args.json, events)
        if events is None:
            print(f"streamer: {error['message']}", file=sys.stderr)
        return int(error["exit_code"])
    else:
        if events is not None:
            events.done()
    finally:
        progress.close()
    return 0


def _run(args: argparse.Namespace, progress: Progress | JsonEvents, events: JsonEvents | None) -> None:
    monitor = Monitor(progress)
    with stop_on_signals(monitor, events.note if events is not None else _say):
        try:
            if getattr(args, "threads", None) is not None:
                _set_threads(args.threads)
            COMMANDS[args.command](args, monitor)
        finally:
            if events is None:
                progress.close()
    if sys.stdout is not None:  # it is None where it was closed from the start
        sys.stdout.flush()


def _say(text: str) -> None:
    print(f"streamer: {text}", file=sys.stderr)


def _described(e: Exception) -> dict[str, Any] | None:
    """What is said of an error; None of one that nobody foresaw."""
    kind = type(e).__name__
    if isinstance(e, StreamerError):
        return error_entry(kind, e.exit_code, str(e))
    if isinstance(e, OSError):
        from streamer.storage.atomic import advice

        code = UsageError.exit_code if e.errno == errno.ENAMETOOLONG else StorageError.exit_code
        where = None if e.filename is None else os.fsdecode(e.filename)
        return error_entry(kind, code, f"{where or 'I/O'}: {e.strerror or e}; {advice(e)}", where)
    if isinstance(e, MemoryError):
        advice_text = "out of memory; use fewer threads or a machine with more, then run the same command again"
        return error_entry(kind, 1, advice_text)
    return None


def _tell(error: dict[str, Any], as_json: bool, events: JsonEvents | None) -> None:
    """Say it to programs: on stdout, and on stderr where events go there."""
    if as_json:
        with contextlib.suppress(OSError):  # whoever read us has gone
            print(json.dumps(errors_object([error]), indent=1), flush=True)
    if events is not None:
        events.error(error)


def _refuse(e: BadUsage, argv: Sequence[str]) -> None:
    """Say what is wrong with the arguments, in the form that those which could be read ask for."""
    error = error_entry("UsageError", UsageError.exit_code, e.message.partition(": error: ")[2])
    events = JsonEvents() if "--json-events" in argv else None
    _tell(error, "--json" in argv, events)
    if events is None:
        print(f"{e.usage}{e.message}", file=sys.stderr)
    else:
        events.close()


def _set_threads(n: int) -> None:
    if n < 1:
        raise UsageError(f"--threads: expected a number from 1, found {n}")
    import torch

    torch.set_num_threads(n)


def main() -> NoReturn:
    """Entry point of the `streamer` command."""
    sys.exit(run())
