"""Entry point of the command: runs what was asked for, turns errors into one line and an exit code. Nothing heavy is imported before."""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import NoReturn

from streamer.cli.commands import COMMANDS
from streamer.cli.parser import build_parser
from streamer.cli.progress import Progress, say
from streamer.cli.signals import stop_on_signals
from streamer.cli.summary import summary
from streamer.cli.threads import set_threads, wait_passively
from streamer.errors import StorageError, StreamerError, UsageError
from streamer.events import Monitor


def run(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    _open_missing_streams()
    wait_passively()
    args = build_parser().parse_args(argv)
    progress = Progress(
        args.progress, args.quiet, args.command + (" --dry-run" if getattr(args, "dry_run", False) else "")
    )
    monitor = Monitor(progress)
    try:
        prints = args.json or not args.quiet
        if prints and sys.stdout is None:
            raise StorageError(
                "stdout: is closed, and the result goes there; redirect it to a file or /dev/null, or pass --quiet"
            )
        with stop_on_signals(monitor, progress.tell):
            try:
                set_threads(getattr(args, "threads", None))
                tree, text = COMMANDS[args.command](args, monitor)
            finally:
                progress.close()
        if prints:
            _print(json.dumps(tree, indent=1) if args.json else text)
        # On a terminal the numbers stand just above.
        shown = prints and not args.json and sys.stdout.isatty()
        progress.finish("" if shown else summary(tree))
    except StreamerError as e:
        say(f"streamer: {e}")
        return e.exit_code
    except OSError as e:
        from streamer.storage.atomic import advice

        say(f"streamer: {e.filename or 'I/O'}: {e.strerror or e}; {advice(e)}")
        return UsageError.exit_code if e.errno == errno.ENAMETOOLONG else StorageError.exit_code
    except MemoryError:
        say("streamer: out of memory; use fewer threads or a machine with more, then run the same command again")
        return 1
    return 0


def _open_missing_streams() -> None:
    """Give the null device the numbers of closed standard streams, lest a file that is opened gets one and what is printed goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _print(text: str = "") -> None:
    """Print a result on stdout, or what is on its way there.

    Raises
    ------
    StorageError
        If it cannot be written; a reader that has gone is no fault.
    """
    if sys.stdout is None:
        return
    try:
        print(text, end="\n" if text else "", flush=True)
    except OSError as e:
        silent = os.open(os.devnull, os.O_WRONLY)  # for what stays in Python's buffer until the process ends
        os.dup2(silent, sys.stdout.fileno())
        os.close(silent)
        if not isinstance(e, BrokenPipeError):
            message = f"stdout: {e.strerror or e}; the result could not be printed, what was written to files stands"
            raise StorageError(message) from e


def main() -> NoReturn:
    """Entry point of the `streamer` command."""
    try:
        code = run()
    except SystemExit:  # the parser's, after help or a wrong option
        try:
            _print()
        except StorageError as e:
            say(f"streamer: {e}")
            sys.exit(e.exit_code)
        raise
    sys.exit(code)
