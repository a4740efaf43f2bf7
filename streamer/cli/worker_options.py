"""Declare the options of commands that divide work among workers."""

from __future__ import annotations

import argparse

from streamer.cli.arguments import integer


def add_workers(sub: argparse.ArgumentParser, parts: bool = False) -> None:
    """Add the options for workers on this machine or an engine, and the `parts` of a job array."""
    g = sub.add_argument_group("workers (docs/workers.md)")
    g.add_argument("--workers", type=integer, metavar="N",
                   help="compute in N processes that share the cores and --max-memory (default: in this process)")  # fmt: skip
    g.add_argument("--executor", metavar="ENGINE:ADDRESS",
                   help="compute on the workers of a cluster: dask:HOST:PORT, dask:FILE.json (its scheduler file), ray:auto or "
                        "ray:HOST:PORT; --threads and --max-memory apply to each task")  # fmt: skip
    if parts:
        g.add_argument("--part", type=_part, metavar="I/N",
                       help="run detection on part I of N (for job arrays) and write the result to a file beside FILE; when all parts "
                            "are done, the same command without --part joins them")  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N like 1/8, with I from 1 to N, found {text!r}")
    return int(number), int(count)
