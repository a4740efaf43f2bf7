"""Entry point of the command: runs what was asked for, turns errors into one line and an exit code. Nothing heavy is imported before."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

from streamer.cli.commands import COMMANDS
from streamer.cli.parser import build_parser
from streamer.cli.progress import Progress
from streamer.cli.signals import stop_on_signals
from streamer.cli.threads import set_threads, wait_passively
from streamer.errors import StorageError, StreamerError, UsageError
from streamer.events import Monitor


def run(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    wait_passively()
    args = build_parser().parse_args(argv)
    progress = Progress(args.quiet)
    monitor = Monitor(progress)
    try:
        with stop_on_signals(monitor):
            try:
                set_threads(getattr(args, "threads", None))
                COMMANDS[args.command](args, monitor)
            finally:
                progress.close()
        sys.stdout.flush()
    except StreamerError as e:
        print(f"streamer: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone; that is no fault
        return 0
    except OSError as e:
        from streamer.storage.atomic import advice

        print(f"streamer: {e.filename or 'I/O'}: {e.strerror or e}; {advice(e)}", file=sys.stderr)
        return UsageError.exit_code if e.errno == errno.ENAMETOOLONG else StorageError.exit_code
    except MemoryError:
        print(
            "streamer: out of memory; use fewer threads or a machine with more, then run the same command again",
            file=sys.stderr,
        )
        return 1
    return 0


def main() -> NoReturn:
    """Entry point of the `streamer` command."""
    sys.exit(run())
