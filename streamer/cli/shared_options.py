"""Declare the options that several commands share: of texts, computing, fits, maps and workers."""

from __future__ import annotations

import argparse

from streamer.api.choices import available_cores
from streamer.cli.arguments import integer, number, numbers, size


def add_texts(sub: argparse.ArgumentParser, sequences: int = 64, built_in: bool = False) -> None:
    """Add the two texts, how much of each to read, and the dtype of products; `built_in` if general text has a default."""
    more = " (default: Python's built-in help texts; your own text works better)" if built_in else ""
    sub.add_argument("--general", required=not built_in, metavar="TEXT",
                     help=f"general text, for measuring forgetting: .txt, .jsonl or .npy{more}")  # fmt: skip
    sub.add_argument("--task", required=True, metavar="TEXT",
                     help="text from ADAPTER's task but not from its training data")  # fmt: skip
    sub.add_argument("--sequences", type=integer, default=sequences, metavar="N",
                     help=f"maximum number of sequences per text (default: {sequences})")  # fmt: skip
    sub.add_argument("--length", type=integer, default=512, metavar="N",
                     help="maximum number of tokens per sequence (default: 512)")  # fmt: skip
    sub.add_argument("--dtype", choices=["float32", "bf16"], default="float32",
                     help="dtype of products with base weights; bf16 is faster on some processors (default: float32)")  # fmt: skip


def add_device(group: argparse._ActionsContainer) -> None:
    """Add the device option."""
    group.add_argument("--device", default="auto", metavar="DEV",
                       help="cpu, cuda or cuda:i (cuda has not been run on a GPU yet); auto: run detection on a GPU if "
                            "there is one, and models on the CPU (default: auto)")  # fmt: skip


def add_computing(sub: argparse.ArgumentParser, default: str = "no limit") -> None:
    """Add the computing options of a command that runs the model; `default` describes the default memory."""
    g = sub.add_argument_group("computing")
    g.add_argument("--max-memory", type=size, metavar="SIZE",
                   help="memory limit, such as 600M or 4G, not counting memory-mapped files; it decides how many sequences run together "
                        f"(default: {default})")  # fmt: skip
    add_device(g)
    add_threads(g)


def add_threads(group: argparse._ActionsContainer, more: str = "") -> None:
    """Add the number of threads; `more` is appended to its help."""
    cores = available_cores()
    default = f"OMP_NUM_THREADS, or one per core available to this process, {cores} here"
    group.add_argument("--threads", type=integer, metavar="N", help=f"CPU threads (default: {default}{more})")


def add_fit(sub: argparse.ArgumentParser, several: bool = True) -> None:
    """Add the options of a fit, for one share or for `several`."""
    what = "shares of the learning to keep; each gives one set" if several else "share of the learning to keep"
    sub.add_argument("--keep", type=numbers if several else number, default=0.9, metavar="SHARE,SHARE" if several else "SHARE",
                     help=f"{what} (default: 0.9)")  # fmt: skip
    sub.add_argument("--holdout", type=number, default=0.25, metavar="SHARE",
                     help="share of each text's sequences to hold out for choosing and measuring (default: 0.25)")  # fmt: skip
    sub.add_argument(
        "--seed", type=integer, default=0, metavar="N", help="decides which sequences are held out (default: 0)"
    )


def add_map(sub: argparse.ArgumentParser) -> None:
    """Add the options of a map."""
    sub.add_argument("--general", metavar="TEXT", help="general text to run through BASE: .txt, .jsonl or .npy "
                     "(default: Python's built-in help texts)")  # fmt: skip
    sub.add_argument("--vectors", type=integer, metavar="N",
                     help="leading vectors to store for each input (default: 16; for several maps: "
                          "as many as the largest has)")  # fmt: skip
    sub.add_argument("--sequences", type=integer, metavar="N", help="maximum number of sequences (default: 32)")
    sub.add_argument("--length", type=integer, metavar="N", help="maximum number of tokens per sequence (default: 512)")
    sub.add_argument("--dtype", choices=["float32", "bf16"],
                     help="dtype of products with base weights; bf16 is faster on some processors (default: float32)")  # fmt: skip


def add_workers(sub: argparse.ArgumentParser) -> None:
    """Add the options for workers on this machine or an engine."""
    g = sub.add_argument_group("workers (docs/workers.md)")
    g.add_argument("--workers", type=integer, metavar="N",
                   help="compute in N processes that share the cores and --max-memory (default: in this process)")  # fmt: skip
    g.add_argument("--executor", metavar="ENGINE:ADDRESS",
                   help="compute on the workers of a cluster: dask:HOST:PORT, dask:FILE.json (its scheduler file), ray:auto or "
                        "ray:HOST:PORT; --threads and --max-memory apply to each task")  # fmt: skip
