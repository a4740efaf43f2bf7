"""Parse the command line: every command and option, declared once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from streamer import __version__
from streamer.api.choices import ABOUT, DEFAULT_METHOD, WITHOUT_FILES
from streamer.cli.arguments import Parser, number, numbers, path, rank, sample, size, top_k
from streamer.cli.help import DESCRIPTION, EPILOG, EXAMPLES, EXIT_CODES
from streamer.cli.text_options import add_computing, add_device, add_fit, add_map, add_texts, add_threads
from streamer.cli.worker_options import add_workers

OPTIONS = {
    "threshold_epsilon": "--epsilon",
    **{name: f"--{name.replace('_', '-')}" for name in
       ("architecture", "coefficients", "device", "dtype", "grain", "holdout", "keep", "lambda", "length", "map", "max_memory",
        "method", "other",
        "objective", "scale", "seed", "sequences", "solver", "steps", "to_lora", "top_k")},
}  # fmt: skip
"""The options of the library's keywords, by which its messages call them."""


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script and leave."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        from streamer.cli.completion import completion_script

        try:
            print(completion_script(parser, str(values)))
        except ImportError:
            parser.error(
                f"{option_string}: needs shtab, which is not installed: pip install 'intruder-streamer[completion]'"
            )
        parser.exit()


def _not_a_directory(text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"is a share in other commands; use `-o {text}` for a directory")


def named_as_option(message: str) -> str:
    """Name the library's keywords as the user's options: one that begins a message, and flags like ``amplify=True``."""
    head, colon, rest = re.sub(r"`(\w+)=True`", r"`--\1`", message).partition(": ")
    return f"{OPTIONS.get(head, head)}{colon}{rest}"


def add_amplify(group: argparse._ActionsContainer) -> None:
    """Add ``--amplify``."""
    group.add_argument("--amplify", action="store_true",
                       help="allow a lambda outside [0, 1]: above 1 an intruder grows, below 0 its sign changes")  # fmt: skip


def build_parser() -> Parser:
    """Build the parser; options are declared here, once."""
    parser = Parser(prog="streamer", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"streamer {__version__}")
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=["bash", "zsh", "tcsh"], metavar="SHELL",
                        help="print a completion script for bash, zsh or tcsh and exit; needs the extra [completion]")  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    saying = Parser(add_help=False)
    g = saying.add_argument_group("what is printed")
    g.add_argument("--json", action="store_true",
                        help="print one JSON object to stdout, also on failure; see docs/formats.md")  # fmt: skip
    g.add_argument("--json-events", action="store_true",
                        help="print one JSON object per line to stderr instead of progress, warnings and errors")  # fmt: skip
    g.add_argument("-q", "--quiet", action="count", default=0,
                        help="no progress, no table, no last line; twice (-qq): no warnings either")  # fmt: skip
    g.add_argument("--progress", choices=["auto", "bar", "plain", "none"], default="auto",
                        help="on stderr: a bar, or a line every 30 s (plain); auto: a bar on a terminal, else plain")  # fmt: skip
    g.add_argument("--all", action="store_true",
                        help="show every row and column; by default, tables show those that matter most")  # fmt: skip
    g.add_argument(
        "--no-legend", dest="legend", action="store_false", help="omit the lines that explain the columns of tables"
    )

    of_base = Parser(add_help=False)
    g = of_base.add_argument_group("input")
    g.add_argument("--io", choices=["mmap", "pread"], default="mmap",
                         help="how tensors are read; pread is for network file systems (default: mmap)")  # fmt: skip
    g.add_argument("--remote", choices=["cache", "stream"],
                   help="how to read an input at an address: cache downloads what is needed first; stream reads byte ranges and keeps "
                        "nothing (if not given: cache from the hub, else stream)")  # fmt: skip
    g.add_argument("--architecture", metavar="NAME",
                   help="class of BASE in transformers, like GPT2LMHeadModel, if its config.json does not name it; needed only if a "
                        "message asks for it")  # fmt: skip

    of_adapter = Parser(add_help=False)
    g = of_adapter.add_argument_group("input")
    g.add_argument("--base-is-residual", action="store_true",
                   help="BASE is the residual model of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ on which ADAPTER was trained")  # fmt: skip
    g.add_argument("--lora-b-layout", choices=["rank_major", "grouped_by_expert"],
                   help="order of lora_B's columns on stacked experts, if ADAPTER does not state it: rank_major is PEFT's, "
                        "grouped_by_expert was Unsloth's until September 2026")  # fmt: skip
    g.add_argument("--ignore-key", dest="ignore_keys", action="append", default=[], metavar="KEY",
                   help="accept the unknown key KEY of the adapter's config and ignore it; can be repeated")  # fmt: skip
    reading = Parser(add_help=False, parents=[of_base, of_adapter])

    computing = Parser(add_help=False)
    g = computing.add_argument_group("detection")
    g.add_argument("--top-k", type=top_k, metavar="K",
                   help="judge the K largest singular directions: a count, or a share like 0.1 (default: 10)")  # fmt: skip
    g.add_argument("--epsilon", dest="threshold_epsilon", type=number, metavar="E",
                   help="a direction whose similarity to the base is below E is an intruder (default: 0.5)")  # fmt: skip
    g.add_argument("--solver", choices=["auto", "certified", "dense"],
                   help="certified: Krylov with bounds; dense: LAPACK's full SVD; auto: the cheaper one (default: auto)")  # fmt: skip
    g.add_argument("--max-memory", type=size, metavar="SIZE",
                   help="the most memory to take, like 600M or 4G, mapped files and a GPU's driver not counted: large matrices take "
                        "longer, what only a full SVD could settle stays open, and what does not fit is refused "
                        "(default: as much as it takes)")  # fmt: skip
    add_device(g)
    add_threads(g, "; beside other work a detection uses fewer where it measures that more are slower, and says so")

    def writing(metavar: str, text: str) -> Parser:
        parent = Parser(add_help=False)
        g = parent.add_argument_group("output")
        g.add_argument("-o", "--output", required=True, metavar=metavar, help=text)
        g.add_argument("--dry-run", action="store_true",
                       help="check everything, forecast memory, disk and time, and write nothing")  # fmt: skip
        g.add_argument(
            "--no-resume",
            dest="resume",
            action="store_false",
            help="start over instead of resuming an interrupted run",
        )
        g.add_argument("--overwrite", action="store_true",
                       help="replace an existing output (the files that its record lists), or write into a directory of other files, which "
                            "are kept; refused if one of them has a name that the output needs or that a loader would read")  # fmt: skip
        return parent

    mitigating = Parser(add_help=False)
    g = mitigating.add_argument_group("mitigation")
    g.add_argument("--lambda", dest="mitigation_lambda", type=number, metavar="L",
                   help="share of an intruder that is kept, from 0 (removed) to 1 (unchanged) (default: 0.75); with --map, the share "
                        "of each delta's energy on general inputs (default: 0.6)")  # fmt: skip
    add_amplify(g)
    g.add_argument("--method", choices=list(ABOUT), metavar="NAME",
                   help="; ".join(f"{name}: {about}" for name, about in ABOUT.items())
                        + f"; if not given, that of --coefficients or --map, else {DEFAULT_METHOD}")  # fmt: skip
    g.add_argument("--coefficients", metavar="FILE",
                   help="from `streamer fit`; detection and --lambda are not used")  # fmt: skip
    g.add_argument("--keep", type=number, metavar="SHARE",
                   help="which coefficients, where FILE has several sets: those that keep this share of what was learned")  # fmt: skip
    g.add_argument("--map", type=path, metavar="FILE", help="from `streamer map` on BASE; detection is not used")
    g.add_argument("--scale", choices=["all", "first"], default="all",
                   help="which intruders: all among the top k, or the highest-ranked one of each matrix (default: all)")  # fmt: skip
    g.add_argument("--no-card", dest="model_card", action="store_false",
                   help="do not describe in the output's model card (README.md) how it was made")  # fmt: skip
    g.add_argument("--findings", type=path, metavar="FILE",
                   help="from `streamer detect` (of several adapters, its directory); without it detection runs first")  # fmt: skip

    def command(name: str, text: str, *parents: Parser) -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                   epilog=f"{EXAMPLES[name]}\n{EXIT_CODES}", parents=[*parents, saying])  # fmt: skip

    def inputs(sub: Parser, nargs: str | None = None) -> None:
        several = "; several, or a directory of them, in one pass over the base" if nargs == "+" else "; one only"
        sub.add_argument(
            "base", metavar="BASE", help="model directory, or one .safetensors file; a name on the hub, or an address"
        )
        sub.add_argument(
            "adapter", metavar="ADAPTER", nargs=nargs, help=f"PEFT adapter's directory, name or address{several}"
        )

    sub = command("inspect", "show what is there, and which tensor each module changes", reading)
    inputs(sub, "?")
    out = writing(
        "FILE", "findings to write, a .safetensors file; of several adapters a directory, for NAME.safetensors each"
    )
    sub = command("detect", "find the intruder dimensions and write the findings", out, computing, reading)
    inputs(sub, "+")
    add_workers(sub)
    out = writing("DIR", "adapter directory to write; of several adapters a directory, for an adapter NAME each")
    sub = command("mitigate", "write a mitigated adapter", out, mitigating, computing, reading)
    inputs(sub, "+")
    sub.add_argument("--to-lora", type=rank, metavar="RANK", help="write a LoRA adapter of this rank, whatever kind ADAPTER is of; a "
                     "share like 0.95 is of the energy of each delta, kept with the least rank; what is left out is reported")  # fmt: skip
    out = writing("DIR", "model directory to write; of several adapters a directory, for a model NAME each")
    sub = command("merge", "write the base with the mitigated adapter merged in", out, mitigating, computing, reading)
    inputs(sub, "+")
    sub.add_argument("--dequantize", action="store_true",
                     help="write a plain model where the base is quantized, in the dtype of its config")  # fmt: skip
    sub = command("report", "show findings or an output as a table, as JSON, as a page, or as figures", reading)
    sub.add_argument(
        "findings",
        metavar="FINDINGS",
        help="file written by `streamer detect`, a directory of such files, or an output's directory",
    )
    sub.add_argument("base", metavar="EVALUATION", nargs="?",
                     help="file written by `streamer evaluate`, of the same adapter; or BASE, where coefficients are given")  # fmt: skip
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="the adapter, where BASE is given")
    sub.add_argument("--coefficients", metavar="FILE",
                     help="from `streamer fit`: show what they leave of the intruders, beside the whole adapter")  # fmt: skip
    sub.add_argument("--keep", type=number, metavar="SHARE",
                     help="which coefficients, where FILE has several sets: those that keep this share of what was learned")  # fmt: skip
    sub.add_argument(
        "-o",
        "--output",
        metavar="PAGE",
        help="page to write, a name that ends in .html; or a directory, for SVG and PNG",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace another report; no other file is ever replaced")
    sub = command("diff", "show what became of each intruder between two findings on one base")
    sub.add_argument("first", metavar="FINDINGS", help="findings before: on an adapter, or an earlier checkpoint")
    sub.add_argument(
        "second", metavar="FINDINGS", help="findings after: on the mitigated adapter, or a later checkpoint"
    )
    sub = command("verify", "compare an output with its record and its inputs, by other code than wrote it")
    sub.add_argument(
        "output", metavar="OUTPUT", help="one merged model's or mitigated adapter's directory, or findings"
    )
    sub.add_argument(
        "base",
        metavar="BASE",
        nargs="?",
        help="what it was made from: its config, files and a sample of its matrices are compared",
    )
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="the adapter, where BASE is given")
    sub.add_argument("--sample", type=sample, default=3, metavar="N",
                     help="how many matrices to recompute, spread over their kinds (default: 3); all: every matrix, and every other "
                          "tensor byte by byte")  # fmt: skip
    sub.add_argument("--max-memory", type=size, metavar="SIZE",
                     help="do not recompute matrices that take more memory, like 4G (default: as much as it takes)")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="from `streamer fit`: what OUTPUT was made with, if that is method regmean, to recompute it")  # fmt: skip
    sub.add_argument("--map", metavar="FILE",
                     help="from `streamer map`: what OUTPUT was made with, if that is method nullspace, to recompute it")  # fmt: skip
    out = writing(
        "FILE", "JSON file to write; variants are added to an evaluation of the same inputs, texts and options"
    )
    sub = command("evaluate", "measure on texts what each method and lambda keeps and forgets", out, computing, reading)
    inputs(sub)
    add_texts(sub)
    sub.add_argument("--other", action="append", metavar="TEXT",
                     help="another text to measure; it does not affect the suggestion (repeatable)")  # fmt: skip
    sub.add_argument(
        "--findings",
        type=path,
        metavar="FILE",
        help="from `streamer detect`; without it detection runs first, into memory",
    )
    sub.add_argument("--lambda", dest="lambdas", type=numbers, default=(0.9, 0.75, 0.5, 0.25, 0.0), metavar="L,L",
                     help="shares of an intruder that are kept, several (default: 0.9,0.75,0.5,0.25,0)")  # fmt: skip
    add_amplify(sub)
    sub.add_argument("--method", dest="methods", type=lambda text: text.split(","), default=list(WITHOUT_FILES),
                     metavar="M,M", help=f"of {', '.join(WITHOUT_FILES)} one or several (default: all); the method of FILE: "
                                         "the coefficients alone")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="from `streamer fit`: each set in FILE is one more variant; give text they were not fitted to")  # fmt: skip
    sub.add_argument(
        "--map", type=path, metavar="FILE", help="from `streamer map`: method nullspace is evaluated as well"
    )
    sub.add_argument(
        "--scale", choices=["all", "first"], default="all", help="which intruders of each matrix (default: all)"
    )
    sub.add_argument("--keep", type=number, default=0.9, metavar="SHARE",
                     help="share of what ADAPTER learned that the suggestion keeps at least; up to three more measurements find the "
                          "lambda of the shrink that keeps it (default: 0.9)")  # fmt: skip
    sub.add_argument("--projected", action="store_true",
                     help="evaluate what `mitigate` writes, projected onto the adapter's rank, instead of what `merge` writes")  # fmt: skip
    out = writing("FILE", "coefficients or factors to write, a .safetensors file")
    sub = command("fit", "fit an adapter to texts: new factors, or a coefficient for each direction", out, reading)
    inputs(sub)
    add_texts(sub)
    add_fit(sub)
    add_computing(sub, "as much as gradients of 1,024 tokens and measures of 4,096 take")
    out = writing("FILE", "map to write, a .safetensors file")
    sub = command("map", "record a base's inputs on general text; --map then repairs without any text", out, of_base)
    sub.add_argument("base", metavar="BASE", nargs="+",
                     help="model directory, name on the hub, or address; or maps of one base on several texts, to add")  # fmt: skip
    add_map(sub)
    add_computing(sub)
    out = writing("DIR", "directory to write: an adapter, or with --merge a model")
    sub = command("repair", "write an adapter that forgets less, if measurements show it", out, reading)
    inputs(sub)
    add_texts(sub, built_in=True)
    add_fit(sub, several=False)
    sub.add_argument("--findings", type=path, metavar="FILE",
                     help="from `streamer detect`: also measure the effect of scaling these intruders")  # fmt: skip
    sub.add_argument("--merge", action="store_true", help="write a model with the repaired adapter merged in")
    sub.add_argument(
        "--dequantize", action="store_true", help="with --merge: if the base is quantized, write a plain model"
    )
    sub.add_argument("--no-card", dest="model_card", action="store_false",
                     help="do not describe in the output's model card (README.md) how it was made")  # fmt: skip
    add_computing(sub)
    sub = command("demo", "run the whole job on a small generated model with planted intruders")
    sub.add_argument("--lambda", dest="mitigation_lambda", type=number, default=0.0, metavar="L",
                     help="share of an intruder that is kept, from 0 (removed) to 1 (unchanged) (default: 0)")  # fmt: skip
    add_amplify(sub)
    sub.add_argument("-o", "--output", metavar="DIR", help="write everything to DIR, which must not exist, and keep it")
    sub.add_argument("--keep", type=_not_a_directory, help=argparse.SUPPRESS)
    return parser
