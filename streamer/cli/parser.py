"""Define the command line: every command and option, declared once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from streamer import __version__
from streamer.api.choices import ABOUT, DEFAULT_METHOD, WITHOUT_FILES
from streamer.cli.arguments import Parser, number, numbers, path, rank, sample, size, top_k
from streamer.cli.help import DESCRIPTION, EPILOG, EXAMPLES, EXIT_CODES
from streamer.cli.shared_options import add_computing, add_device, add_fit, add_map, add_texts, add_threads, add_workers

OPTIONS = {
    "threshold_epsilon": "--epsilon",
    **{name: f"--{name.replace('_', '-')}" for name in
       ("amplify", "architecture", "coefficients", "device", "dtype", "holdout", "keep", "lambda", "length", "map", "max_memory", "method",
        "other", "seed", "select", "sequences", "solver", "to_lora", "top_k")},
}  # fmt: skip
"""Options by the library's keyword, so that messages can name the option."""


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script and exit."""

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


def named_as_option(message: str) -> str:
    """Replace the library's keywords by options: a keyword that begins a message, and flags like ``amplify=True``."""
    head, colon, rest = re.sub(r"`(\w+)=True`", r"`--\1`", message).partition(": ")
    return f"{OPTIONS.get(head, head)}{colon}{rest}"


def add_amplify(group: argparse._ActionsContainer) -> None:
    """Add ``--amplify``."""
    group.add_argument("--amplify", action="store_true",
                       help="allow a lambda outside [0, 1]: above 1 enlarges an intruder, below 0 changes its sign")  # fmt: skip


def add_to_lora(sub: argparse.ArgumentParser, about: str) -> None:
    """Add ``--to-lora``."""
    sub.add_argument("--to-lora", type=rank, metavar="RANK",
                     help=f"{about}a share such as 0.95 uses the smallest rank that keeps this share of each delta's energy")  # fmt: skip


def build_parser() -> Parser:
    """Build the parser; every option is declared here or in the modules that it calls."""
    parser = Parser(prog="streamer", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"streamer {__version__}")
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=["bash", "zsh", "tcsh"], metavar="SHELL",
                        help="print a completion script for bash, zsh or tcsh and exit; needs the extra [completion]")  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    saying = Parser(add_help=False)
    g = saying.add_argument_group("printing")
    g.add_argument("--json", action="store_true",
                        help="print one JSON object to stdout, even on failure; see docs/formats.md")  # fmt: skip
    g.add_argument("--json-events", action="store_true",
                        help="print one JSON object per line to stderr instead of progress, warnings and errors")  # fmt: skip
    g.add_argument("-q", "--quiet", action="count", default=0,
                        help="print only warnings and errors; twice (-qq): only errors")  # fmt: skip
    g.add_argument("--progress", choices=["auto", "bar", "plain", "none"], default="auto",
                        help="how to show progress: a bar, or a line every 30 s (plain); auto: bar on a terminal, else plain")  # fmt: skip
    g.add_argument("--all", action="store_true",
                        help="show every row and column of tables, not only the most important ones")  # fmt: skip
    g.add_argument(
        "--no-legend", dest="legend", action="store_false", help="omit the lines that explain the columns of tables"
    )

    of_base = Parser(add_help=False)
    g = of_base.add_argument_group("input")
    g.add_argument("--io", choices=["mmap", "pread"], default="mmap",
                         help="how to read tensors; use pread on network file systems (default: mmap)")  # fmt: skip
    g.add_argument("--remote", choices=["cache", "stream"],
                   help="how to read an input at an address. cache: download what is needed before starting; stream: read byte ranges "
                        "and store nothing (if not given: cache for the hub, else stream)")  # fmt: skip
    g.add_argument("--architecture", metavar="NAME",
                   help="class of BASE in transformers, such as GPT2LMHeadModel; needed only if a message asks for it")  # fmt: skip

    of_adapter = Parser(add_help=False)
    g = of_adapter.add_argument_group("input")
    g.add_argument("--base-is-residual", action="store_true",
                   help="BASE is the residual of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ, on which ADAPTER was trained")  # fmt: skip
    g.add_argument("--lora-b-layout", choices=["rank_major", "grouped_by_expert"],
                   help="order of lora_B's columns for stacked experts, if ADAPTER does not state it: rank_major (PEFT), or "
                        "grouped_by_expert (Unsloth until September 2026)")  # fmt: skip
    g.add_argument("--ignore-key", dest="ignore_keys", action="append", default=[], metavar="KEY",
                   help="ignore the unknown key KEY of the adapter's config (repeatable)")  # fmt: skip
    reading = Parser(add_help=False, parents=[of_base, of_adapter])

    computing = Parser(add_help=False)
    g = computing.add_argument_group("detection")
    g.add_argument("--top-k", type=top_k, metavar="K",
                   help="leading directions to examine in each matrix, as a count or as a share such as 0.1 (default: 10)")  # fmt: skip
    g.add_argument("--epsilon", dest="threshold_epsilon", type=number, metavar="E",
                   help="a direction is an intruder if its similarity to the base is below E (default: 0.5)")  # fmt: skip
    g.add_argument("--solver", choices=["auto", "certified", "dense"],
                   help="certified: Krylov with bounds; dense: LAPACK's full SVD; auto: the cheaper one (default: auto)")  # fmt: skip
    g.add_argument("--max-memory", type=size, metavar="SIZE",
                   help="memory limit, such as 600M or 4G, not counting memory-mapped files and the GPU driver. With a low limit, large "
                        "matrices take longer, and directions that need a full SVD are left undecided; a matrix that does not fit is "
                        "refused (default: no limit)")  # fmt: skip
    add_device(g)
    add_threads(g, "; on a busy machine, detection uses fewer threads if a measurement shows that this is faster")

    def writing(metavar: str, text: str) -> Parser:
        parent = Parser(add_help=False)
        g = parent.add_argument_group("output")
        g.add_argument("-o", "--output", required=True, metavar=metavar, help=text)
        g.add_argument("--dry-run", action="store_true",
                       help="check inputs and options, forecast memory, disk and time, and write nothing")  # fmt: skip
        g.add_argument(
            "--no-resume",
            dest="resume",
            action="store_false",
            help="start over instead of resuming an interrupted run",
        )
        g.add_argument("--overwrite", action="store_true",
                       help="replace an existing output, or write into a directory with other files. Unrelated files are kept; the run is "
                            "refused if one of them has a name that the output needs or a loader would read")  # fmt: skip
        return parent

    mitigating = Parser(add_help=False)
    g = mitigating.add_argument_group("mitigation")
    g.add_argument("--lambda", dest="mitigation_lambda", type=number, metavar="L",
                   help="share of each intruder (project: of the adapter's part; shrink: of the adapter) to keep, from 0 (remove) to 1 "
                        "(keep) (default: 0.75); with --map, share of each delta's energy on general inputs (default: 0.6)")  # fmt: skip
    add_amplify(g)
    g.add_argument("--method", choices=list(ABOUT), metavar="NAME",
                   help="; ".join(f"{name}: {about}" for name, about in ABOUT.items())
                        + f"; with --coefficients or --map, the file sets the method (default: {DEFAULT_METHOD})")  # fmt: skip
    g.add_argument("--coefficients", metavar="FILE",
                   help="factors from `streamer fit`; detection and --lambda are not used")  # fmt: skip
    g.add_argument("--keep", type=number, metavar="SHARE",
                   help="if --coefficients has several sets: use the one for this share of the learning")  # fmt: skip
    g.add_argument("--map", type=path, metavar="FILE", help="map of BASE from `streamer map`; detection is not used")
    g.add_argument("--select", "--scale", choices=["all", "first"], default="all",
                   help="scale all intruders among the top k, or only the highest-ranked one of each matrix (default: all)")  # fmt: skip
    g.add_argument("--no-card", dest="model_card", action="store_false",
                   help="do not describe in the model card (README.md) how the output was made")  # fmt: skip
    g.add_argument("--findings", type=path, metavar="FILE",
                   help="findings from `streamer detect` (a directory for several adapters); without it, detection runs first")  # fmt: skip

    def command(name: str, text: str, *parents: Parser) -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                   epilog=f"{EXAMPLES[name]}\n{EXIT_CODES}", parents=[*parents, saying])  # fmt: skip

    def inputs(sub: Parser, nargs: str | None = None) -> None:
        several = "; several, or a directory of them, share one pass over the base" if nargs == "+" else "; only one"
        sub.add_argument("base", metavar="BASE", help="directory of model or pipeline, file, hub name or address")
        sub.add_argument(
            "adapter", metavar="ADAPTER", nargs=nargs, help=f"directory, hub name or address of a PEFT adapter{several}"
        )

    sub = command("inspect", "show which tensor each module of an adapter changes, and forecast the cost", reading)
    inputs(sub, "?")
    each = "for several adapters, a directory that gets one"
    out = writing("FILE", f"findings file to write (.safetensors); {each} NAME.safetensors per adapter")
    sub = command("detect", "find the intruder dimensions and write them to a file", out, computing, reading)
    inputs(sub, "+")
    add_workers(sub)
    out = writing("DIR", f"adapter directory to write; {each} subdirectory NAME per adapter")
    sub = command("mitigate", "write a mitigated adapter", out, mitigating, computing, reading)
    inputs(sub, "+")
    add_to_lora(sub, "write a LoRA adapter of this rank from any kind of adapter; ")
    out = writing("DIR", f"model directory to write; {each} subdirectory NAME per adapter")
    sub = command("merge", "write the base with the mitigated adapter merged in", out, mitigating, computing, reading)
    inputs(sub, "+")
    add_workers(sub)
    sub.add_argument("--dequantize", action="store_true",
                     help="if the base is quantized, write a plain model, in the dtype of its config")  # fmt: skip
    sub = command("report", "show findings or an output as a table, JSON or a page")
    sub.add_argument(
        "findings",
        metavar="FINDINGS",
        help="findings file from `streamer detect`, a directory of such files, or an output's directory",
    )
    sub.add_argument("evaluation", metavar="EVALUATION", nargs="?",
                     help="evaluation of the same adapter from `streamer evaluate`")  # fmt: skip
    sub.add_argument(
        "-o",
        "--output",
        metavar="PAGE",
        help="page to write, a name that ends in .html",
    )
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an existing report; no other file is ever replaced"
    )
    sub = command("diff", "compare two findings on one base: what became of each intruder")
    sub.add_argument("first", metavar="FINDINGS",
                     help="earlier findings: those of the adapter, or of an earlier checkpoint")  # fmt: skip
    sub.add_argument("second", metavar="FINDINGS",
                     help="later findings: those of the mitigated adapter, or of a later checkpoint")  # fmt: skip
    sub = command("verify", "check an output against its record and its inputs, with independent code")
    sub.add_argument(
        "output", metavar="OUTPUT", help="directory of one merged model or mitigated adapter, or a findings file"
    )
    sub.add_argument(
        "base",
        metavar="BASE",
        nargs="?",
        help="base of OUTPUT: also recompute a sample of matrices",
    )
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="the adapter; give it together with BASE")
    sub.add_argument("--sample", type=sample, default=3, metavar="N",
                     help="number of matrices to recompute, spread over their kinds (default: 3); all: recompute every matrix and "
                          "compare every other tensor byte by byte")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="file of the fit that OUTPUT was made with (default: of the recorded name, beside OUTPUT)")  # fmt: skip
    sub.add_argument("--map", metavar="FILE",
                     help="map that OUTPUT was made with (default: of the recorded name, beside OUTPUT)")  # fmt: skip
    out = writing(
        "FILE",
        "JSON file to write; new variants are added to an evaluation of the same inputs, texts and options",
    )
    about = "measure, on your texts, what each method and lambda keeps and forgets"
    sub = command("evaluate", about, out, computing, reading)
    inputs(sub)
    add_texts(sub, sequences=32)
    sub.add_argument("--other", action="append", metavar="TEXT",
                     help="another text to measure; it does not affect the suggestion (repeatable)")  # fmt: skip
    sub.add_argument(
        "--findings",
        type=path,
        metavar="FILE",
        help="findings from `streamer detect`; without it, detection runs first and keeps its findings in memory",
    )
    sub.add_argument("--lambda", dest="lambdas", type=numbers, default=(0.75, 0.5), metavar="L,L",
                     help="shares to keep, separated by commas (default: 0.75,0.5)")  # fmt: skip
    add_amplify(sub)
    sub.add_argument("--method", dest="methods", type=lambda text: text.split(","), default=list(WITHOUT_FILES),
                     metavar="M,M", help=f"one or several of {', '.join(WITHOUT_FILES)}, separated by commas (default: all); to "
                                         "evaluate only the sets in --coefficients, give their method, regmean")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="factors from `streamer fit`: each set is a variant; use texts that they were not fitted to")  # fmt: skip
    sub.add_argument(
        "--map", type=path, metavar="FILE", help="map of BASE from `streamer map`: also evaluate method nullspace"
    )
    sub.add_argument("--select", "--scale", choices=["all", "first"], default="all",
                     help="scale all intruders, or only the first of each matrix (default: all)")  # fmt: skip
    sub.add_argument("--keep", type=number, default=0.9, metavar="SHARE",
                     help="share of the learning that the suggestion must keep; up to four more measurements of a method find the "
                          "λ that keeps this share (default: 0.9)")  # fmt: skip
    sub.add_argument("--projected", action="store_true",
                     help="evaluate deltas projected onto the adapter's rank, as `mitigate` writes them")  # fmt: skip
    add_workers(sub)
    out = writing("FILE", "file of factors to write (.safetensors)")
    sub = command("fit", "fit new factors to your texts", out, reading)
    inputs(sub)
    add_texts(sub)
    add_fit(sub)
    add_computing(sub, "enough to process 1,024 tokens at once for inputs and 4,096 for measurements")
    add_workers(sub)
    out = writing("FILE", "map file to write (.safetensors)")
    sub = command("map", "record the inputs of a base's modules on general text, for --map", out, of_base)
    sub.add_argument("base", metavar="BASE", nargs="+",
                     help="model directory, hub name or address; or several maps of one base to combine")  # fmt: skip
    add_map(sub)
    add_computing(sub)
    add_workers(sub)
    out = writing("DIR", "directory to write: an adapter, or with --merge a model")
    sub = command("repair", "write an adapter that forgets less, as measured on your texts", out, reading)
    inputs(sub)
    add_texts(sub, built_in=True)
    add_fit(sub, several=False)
    sub.add_argument("--findings", type=path, metavar="FILE",
                     help="findings from `streamer detect`: also measure the effect of scaling these intruders")  # fmt: skip
    add_to_lora(sub, "first write ADAPTER, of any kind, as a LoRA adapter of this rank, beside DIR; ")
    sub.add_argument("--merge", action="store_true", help="write a model with the repaired adapter merged in")
    sub.add_argument(
        "--dequantize", action="store_true", help="with --merge: if the base is quantized, write a plain model"
    )
    sub.add_argument("--no-card", dest="model_card", action="store_false",
                     help="do not describe in the model card (README.md) how the output was made")  # fmt: skip
    add_computing(sub)
    add_workers(sub)
    sub = command("demo", "detect and remove planted intruders in a small generated model")
    sub.add_argument("--lambda", dest="mitigation_lambda", type=number, default=0.0, metavar="L",
                     help="share of the adapter's part of an intruder to keep, from 0 (remove) to 1 (unchanged) (default: 0)")  # fmt: skip
    add_amplify(sub)
    sub.add_argument(
        "-o", "--output", metavar="DIR", help="keep all files in DIR, which must not exist (default: keep nothing)"
    )
    return parser
