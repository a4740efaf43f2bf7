"""Declare the options of commands that divide work among workers."""

from __future__ import annotations

import argparse

from streamer.cli.arguments import integer


def add_workers(sub: argparse.ArgumentParser) -> None:
    """Add the options for workers on this machine or an engine."""
    g = sub.add_argument_group("workers (docs/workers.md)")
    g.add_argument("--workers", type=integer, metavar="N",
                   help="compute in N processes that share the cores and --max-memory (default: in this process)")  # fmt: skip
    g.add_argument("--executor", metavar="ENGINE:ADDRESS",
                   help="compute on the workers of a cluster: dask:HOST:PORT, dask:FILE.json (its scheduler file), ray:auto or "
                        "ray:HOST:PORT; --threads and --max-memory apply to each task")  # fmt: skip
