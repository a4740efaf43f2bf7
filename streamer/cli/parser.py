"""The grammar of the command line: every command and option, declared once."""

from __future__ import annotations

import argparse
import re

from streamer import __version__
from streamer.cli.cores import available_cores

EXIT_CODES = """\
exit codes:
  0 done    1 unexpected    2 usage    3 bad or inconsistent input    4 output exists or does not match
  5 locked by another run    6 I/O or space (the same command resumes)    7 numeric or verification failure
  8 input changed during the run    128+N stopped by signal N (the same command resumes)
"""

EPILOG = (
    """\
a first run:
  streamer demo                                         the whole job on a generated model, in seconds
  streamer inspect BASE ADAPTER                         what would be done, matrix by matrix
  streamer detect BASE ADAPTER -o findings.safetensors  find the intruders, once
  streamer mitigate BASE ADAPTER -o DIR --lambda 0.75 --findings findings.safetensors
                                                        a mitigated adapter, for PEFT
  streamer merge BASE ADAPTER -o DIR --lambda 0.75 --findings findings.safetensors
                                                        a plain model with the mitigated adapter merged in

BASE is a model directory (or one .safetensors file), ADAPTER a PEFT adapter's directory; detect and merge take several, or a directory
of adapters, and read the base once for all. Results go to stdout, progress to stderr.

"""
    + EXIT_CODES
)


def _top_k(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size like 600M or 4G, found {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def build_parser() -> argparse.ArgumentParser:
    """The parser; options are declared here, once."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="streamer",
        description="Find the intruder dimensions of a LoRA adapter and scale them down, one matrix at a time.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"streamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    output.add_argument("-q", "--quiet", action="count", default=0,
                        help="no progress, no table, no last line; twice (-qq): no warnings either")  # fmt: skip
    output.add_argument("--progress", choices=["auto", "bar", "plain", "none"], default="auto",
                        help="on stderr: a bar, or a line every 30 s (plain); auto: a bar on a terminal, else plain")  # fmt: skip
    output.add_argument("--all", action="store_true",
                        help="every row in the tables, which otherwise show what matters most where there are many")  # fmt: skip

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--io", choices=["mmap", "pread"], default="mmap",
                         help="how tensors are read; pread is for network file systems (default: mmap)")  # fmt: skip
    reading.add_argument(
        "--base-is-residual",
        action="store_true",
        help="BASE is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model, on which ADAPTER was trained",
    )

    computing = argparse.ArgumentParser(add_help=False)
    g = computing.add_argument_group("detection")
    g.add_argument("--top-k", type=_top_k, metavar="K",
                   help="judge the K largest singular directions: a count, or a share like 0.1 (default: 10)")  # fmt: skip
    g.add_argument("--epsilon", type=float, metavar="E",
                   help="a direction whose similarity to the base is below E is an intruder (default: 0.5)")  # fmt: skip
    g.add_argument(
        "--solver",
        choices=["auto", "certified", "dense"],
        help="certified: Krylov with bounds; dense: LAPACK's full SVD; auto: the cheaper one (default: auto)",
    )
    g.add_argument("--max-memory", type=_size, metavar="SIZE",
                   help="anonymous memory of the whole process, like 600M or 4G, what a GPU's driver takes not counted: large matrices "
                        "are multiplied as they are stored, which takes longer, and what only a full SVD could settle stays open; "
                        "what does not fit is refused (default: as much as it takes)")  # fmt: skip
    g.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:i (default: auto)")
    cores = available_cores()
    g.add_argument("--threads", type=int, metavar="N",
                   help=f"CPU threads (default: OMP_NUM_THREADS, or one for each core of this process, {cores} here)")  # fmt: skip

    writing = argparse.ArgumentParser(add_help=False)
    g = writing.add_argument_group("output")
    g.add_argument("--dry-run", action="store_true", help="all checks, nothing written")
    g.add_argument("--no-resume", action="store_true", help="start over instead of taking up an interrupted run")
    g.add_argument("--overwrite", action="store_true", help="replace what stands at the output")

    mitigating = argparse.ArgumentParser(add_help=False)
    g = mitigating.add_argument_group("mitigation")
    g.add_argument("--lambda", dest="mitigation_lambda", type=float, default=0.75, metavar="L",
                   help="what is left of an intruder: 1 changes nothing, 0 removes it (default: 0.75)")  # fmt: skip
    g.add_argument("--method", choices=["paper", "project", "shrink"], default="paper",
                   help="paper: scale the whole direction; project: only the adapter's part of it; "
                        "shrink: the whole adapter, no detection, the baseline (default: paper)")  # fmt: skip
    g.add_argument("--scale", choices=["all", "first"], default="all",
                   help="every intruder among the top k, or the highest-ranked one of each matrix (default: all)")  # fmt: skip
    g.add_argument(
        "--findings",
        metavar="FILE",
        help="from `streamer detect` (of several adapters, its directory); without it detection runs first",
    )

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES,
                                  formatter_class=raw, parents=[*parents, output])  # fmt: skip

    def inputs(sub: argparse.ArgumentParser, several: bool = False) -> None:
        sub.add_argument("base", metavar="BASE", help="model directory, or one .safetensors file")
        if several:
            sub.add_argument("adapter", metavar="ADAPTER", nargs="+",
                             help="PEFT adapter's directory; several, or a directory of them, in one pass over the base")  # fmt: skip
        else:
            sub.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter's directory")

    sub = command("inspect", "show what is there, and which tensor each module changes", reading)
    sub.add_argument("base", metavar="BASE", help="model directory, or one .safetensors file")
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="PEFT adapter's directory")
    sub = command("detect", "find the intruder dimensions and write the findings", reading, computing, writing)
    inputs(sub, several=True)
    sub.add_argument("-o", "--output", required=True, metavar="FILE",
                     help="findings file to write; of several adapters a directory, for a NAME.safetensors each")  # fmt: skip
    sub = command("mitigate", "write a mitigated adapter", reading, mitigating, computing, writing)
    inputs(sub)
    sub.add_argument(
        "--to-lora",
        type=int,
        metavar="RANK",
        help="write a LoRA adapter of this rank, whatever kind ADAPTER is of; what the rank leaves out is reported",
    )
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="adapter directory to write")
    sub = command(
        "merge", "write the base with the mitigated adapter merged in", reading, mitigating, computing, writing
    )
    inputs(sub, several=True)
    sub.add_argument("-o", "--output", required=True, metavar="DIR",
                     help="model directory to write; of several adapters a directory, for a model NAME each")  # fmt: skip
    sub.add_argument("--dequantize", action="store_true",
                     help="write a plain model where the base is quantized, in the dtype of its config")  # fmt: skip
    sub = command("report", "show findings as a table or as JSON")
    sub.add_argument("findings", metavar="FINDINGS", help="file written by `streamer detect`")
    sub = command("demo", "run the whole job on a small generated model with planted intruders")
    sub.add_argument("--lambda", dest="mitigation_lambda", type=float, default=0.0, metavar="L",
                     help="what is left of an intruder (default: 0: nothing)")  # fmt: skip
    sub.add_argument("--keep", metavar="DIR", help="write everything to DIR, which must not exist, and keep it")
    return parser
