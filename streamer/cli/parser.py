"""Define the command line: every command and option, declared once.

Parse arguments and option values; report an error in one line, with a suggestion.

Declare the options that several commands share: of texts, computing, fits, maps and workers.

Define the help texts: description, first run, examples of each command, exit codes.

Generate shell completion from the parser with shtab, which is imported only when a script is requested.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from streamer import __version__
from streamer.api.choices import ABOUT, DEFAULT_METHOD, REMOVED, WITHOUT_FILES, available_cores
from streamer.units import parse_size, quoted


class BadUsage(SystemExit):
    """Arguments that the parser does not understand; the exit code is 2.

    Attributes
    ----------
    message
        The error and what to do, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Parser(argparse.ArgumentParser):
    """Parser that raises `BadUsage` and accepts no abbreviations, because a new option could break them."""

    def __init__(self, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": raw, **options})

    def error(self, message: str) -> NoReturn:
        """Raise `BadUsage`."""
        message = message.removeprefix("argument ")
        raise BadUsage(message if "did you mean" in message else f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but first refuse unknown options: argparse would report a missing argument for a misspelt option."""
        own = args or () if self._subparsers is None else takewhile(lambda arg: arg.startswith("-"), args or ())
        for arg in takewhile(lambda arg: arg != "--", own):
            name = arg.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                if advice := REMOVED.get(name) or REMOVED.get(f"{self.prog.rpartition(' ')[2]} {name}"):
                    raise BadUsage(f"{name} was removed: {advice}")
                self.error(f"unknown option {quoted(name)}{_closest(name, self._option_string_actions)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error(f"{'unknown option' if rest[0].startswith('-') else 'unexpected argument'} {quoted(rest[0])}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = _closest(str(value), choices)
            raise argparse.ArgumentError(action, f"expected one of {', '.join(choices)}, found {quoted(value)}{near}")


def _closest(given: str, names: Iterable[str]) -> str:
    """Suggest the closest name, if one is close."""
    by_letters = {name.strip("-"): name for name in names}
    close = difflib.get_close_matches(given.strip("-"), by_letters, n=1)
    return f"; did you mean {by_letters[close[0]]}?" if close else ""


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        meant = ""
        with contextlib.suppress(ValueError):
            share = float(text.removesuffix("%").replace(",", ".")) / (100 if text.endswith("%") else 1)
            meant = f"; did you mean {share:g}?"
        raise argparse.ArgumentTypeError(f"expected a number like 0.75, found {quoted(text)}{meant}") from None


def numbers(text: str) -> Sequence[float]:
    """Read comma-separated numbers."""
    return tuple(number(part) for part in text.split(","))


def integer(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {quoted(text)}") from None


def top_k(text: str, expected: str = "a count like 10 or a share like 0.1") -> int | float:
    """Read a count (integer) or a share (decimal number)."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {quoted(text)}") from None


def rank(text: str) -> int | float:
    """Read a rank or a share of the energy."""
    return top_k(text, "a rank like 16 or a share like 0.95")


def sample(text: str) -> int | str:
    """Read how many matrices to recompute."""
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a count from 1 or 'all', found {quoted(text)}")
    return int(text)


def path(text: str) -> str | None:
    """Read a path; an empty one, for example from an unset shell variable, gives None."""
    return text or None


def size(text: str) -> int:
    """Read a size like 4G."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def add_texts(sub: argparse.ArgumentParser, sequences: int = 24, length: int = 64, built_in: bool = False) -> None:
    """Add the two texts, how much of each to read, and the dtype of products; `built_in` if general text has a default."""
    more = " (default: Python's built-in help texts; your own text works better)" if built_in else ""
    sub.add_argument("--general", required=not built_in, metavar="TEXT",
                     help=f"general text, for measuring forgetting: .txt, .jsonl or .npy{more}")  # fmt: skip
    sub.add_argument("--task", required=True, metavar="TEXT",
                     help="text from ADAPTER's task but not from its training data")  # fmt: skip
    sub.add_argument("--sequences", type=integer, default=sequences, metavar="N",
                     help=f"maximum number of sequences per text (default: {sequences})")  # fmt: skip
    sub.add_argument("--length", type=integer, default=length, metavar="N",
                     help=f"maximum number of tokens per sequence (default: {length})")  # fmt: skip
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
    what = (
        "least shares of the learning to keep; each gives one set" if several else "least share of the learning to keep"
    )
    sub.add_argument("--keep", type=numbers if several else number, default=0.9, metavar="SHARE,SHARE" if several else "SHARE",
                     help=f"{what} (default: 0.9)")  # fmt: skip
    sub.add_argument("--mu", dest="weights", type=numbers, default=(0.5, 4.0, 32.0), metavar="M,M",
                     help="weights of the general text to fit and measure, rising (default: 0.5,4,32)")  # fmt: skip
    sub.add_argument("--holdout", type=number, default=0.33, metavar="SHARE",
                     help="share of each text's sequences to hold out for choosing and measuring (default: 0.33)")  # fmt: skip
    sub.add_argument(
        "--seed", type=integer, default=0, metavar="N", help="decides which sequences are held out (default: 0)"
    )


def add_map(sub: argparse.ArgumentParser) -> None:
    """Add the options of a map."""
    sub.add_argument("--general", metavar="TEXT", help="general text to run through BASE: .txt, .jsonl or .npy "
                     "(default: Python's built-in help texts)")  # fmt: skip
    sub.add_argument(
        "--vectors", type=integer, metavar="N", help="leading vectors to store for each input (default: 16)"
    )
    sub.add_argument("--sequences", type=integer, metavar="N", help="maximum number of sequences (default: 32)")
    sub.add_argument("--length", type=integer, metavar="N", help="maximum number of tokens per sequence (default: 128)")
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


DESCRIPTION = """\
Make a LoRA adapter forget less of its base model, one matrix at a time. An
intruder dimension is one of the largest singular directions of a fine-tuned
matrix that resembles none of the base's.
"""

EXIT_CODES = """\
exit codes:
  0 done
  1 unexpected error
  2 usage
  3 bad or inconsistent input
  4 output exists or does not match
  5 locked by another run
  6 I/O, space, or lost workers; the same command resumes
  7 numeric or verification failure
  8 input changed during the run
  128+N stopped by signal N; the same command resumes
"""

EPILOG = (
    """\
a first run:
  streamer inspect BASE ADAPTER
      see which tensor each module changes, and what a run would need
  streamer repair BASE ADAPTER --task TEXT --general TEXT -o DIR
      write an adapter that forgets less, as measured on your texts
  streamer mitigate BASE ADAPTER --method shrink --lambda 0.75 -o DIR
      without texts: scale the whole adapter
  streamer merge BASE DIR --lambda 1 -o MODEL
      write a plain model with that adapter merged in
  streamer evaluate BASE ADAPTER --general TEXT --task TEXT -o FILE
      measure what each method and lambda keeps and forgets

BASE is a model directory or a .safetensors file, ADAPTER the directory of a
PEFT adapter; both can be hub names or addresses. detect, mitigate and merge
accept several adapters and read the base once; other commands accept one.
Results go to stdout, progress to stderr.

"""
    + EXIT_CODES
)

EXAMPLES = {
    "inspect": """\
examples:
  streamer inspect BASE ADAPTER
""",
    "detect": """\
examples:
  streamer detect BASE ADAPTER -o findings.safetensors
  streamer detect BASE ADAPTER1 ADAPTER2 -o found
      writes found/ADAPTER1.safetensors and found/ADAPTER2.safetensors
""",
    "mitigate": """\
examples:
  streamer mitigate BASE ADAPTER -o mild --lambda 0.75
  streamer mitigate BASE ADAPTER -o half --lambda 0.5 --findings f.safetensors
  streamer mitigate BASE ADAPTER -o as-lora --to-lora 32
  streamer mitigate BASE ADAPTER -o repaired --map base.map.safetensors
      apply a map of BASE, made once for all its adapters
""",
    "merge": """\
examples:
  streamer merge BASE ADAPTER -o merged --lambda 0.5
  streamer merge BASE ADAPTER -o plain --dequantize
      a plain model, if BASE is quantized
""",
    "report": """\
examples:
  streamer report findings.safetensors
  streamer report evaluation.json -o report.html
  streamer report DIR -o report.html
      one page for a directory of findings, from several adapters
""",
    "diff": """\
examples:
  streamer diff findings.safetensors after.safetensors
""",
    "verify": """\
examples:
  streamer verify merged
      checks sizes and digests against the record
  streamer verify merged BASE ADAPTER --sample all
      recomputes every matrix, and compares every other tensor byte by byte
""",
    "evaluate": """\
examples:
  streamer evaluate BASE ADAPTER --general web.txt --task chats.jsonl -o e.json
""",
    "fit": """\
examples:
  streamer fit BASE ADAPTER --general g.txt --task t.jsonl -o c.safetensors
""",
    "map": """\
examples:
  streamer map BASE --general web.txt -o base.map.safetensors
""",
    "repair": """\
examples:
  streamer repair BASE ADAPTER --task t.jsonl -o repaired
  streamer repair BASE ADAPTER --task t.jsonl -o repaired --to-lora 32
      also for DoRA, LoHa, LoKr and fine-tuned models
""",
    "demo": """\
examples:
  streamer demo
""",
}


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Generate a shell's completion script.

    Parameters
    ----------
    shell
        ``bash``, ``zsh`` or ``tcsh``.

    Raises
    ------
    ImportError
        If shtab is not installed.
    """
    import shtab

    completes = dict.fromkeys(("BASE", "FILE", "FINDINGS", "EVALUATION", "PAGE"), shtab.FILE)
    completes |= dict.fromkeys(("ADAPTER", "DIR"), shtab.DIRECTORY)
    for action in _actions(parser):
        if action.metavar in completes:
            action.complete = completes[action.metavar]  # type: ignore[attr-defined]  # shtab reads this attribute
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                yield from _actions(sub)


OPTIONS = {
    "threshold_epsilon": "--epsilon", "weights": "--mu",
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
            "--no-resume", dest="resume", action="store_false", help="start over instead of resuming an interrupted run"
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
    sub.add_argument("-o", "--output", metavar="PAGE", help="page to write, a name that ends in .html")
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
    sub.add_argument("base", metavar="BASE", nargs="?", help="base of OUTPUT: also recompute a sample of matrices")
    sub.add_argument("adapter", metavar="ADAPTER", nargs="?", help="the adapter; give it together with BASE")
    sub.add_argument("--sample", type=sample, default=3, metavar="N",
                     help="number of matrices to recompute, spread over their kinds (default: 3); all: recompute every matrix and "
                          "compare every other tensor byte by byte")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="file of the fit that OUTPUT was made with (default: of the recorded name, beside OUTPUT)")  # fmt: skip
    sub.add_argument("--map", metavar="FILE",
                     help="map that OUTPUT was made with (default: of the recorded name, beside OUTPUT)")  # fmt: skip
    out = writing(
        "FILE", "JSON file to write; new variants are added to an evaluation of the same inputs, texts and options"
    )
    about = "measure, on your texts, what each method and lambda keeps and forgets"
    sub = command("evaluate", about, out, computing, reading)
    inputs(sub)
    add_texts(sub, 32, 128)
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
    sub.add_argument("--method", dest="methods", type=lambda text: text.split(","), metavar="M,M",
                     help=f"one or several of {', '.join(WITHOUT_FILES)}, separated by commas (default: shrink, with --findings paper); "
                          "to evaluate only the sets in --coefficients, give their method, regmean")  # fmt: skip
    sub.add_argument("--coefficients", metavar="FILE",
                     help="factors from `streamer fit`: each set is a variant; use texts that they were not fitted to")  # fmt: skip
    sub.add_argument(
        "--map", type=path, metavar="FILE", help="map of BASE from `streamer map`: also evaluate method nullspace"
    )
    sub.add_argument("--select", "--scale", choices=["all", "first"], default="all",
                     help="scale all intruders, or only the first of each matrix (default: all)")  # fmt: skip
    sub.add_argument("--keep", type=number, default=0.9, metavar="SHARE",
                     help="share of the learning that the suggestion must keep (default: 0.9)")  # fmt: skip
    sub.add_argument("--projected", action="store_true",
                     help="evaluate deltas projected onto the adapter's rank, as `mitigate` writes them")  # fmt: skip
    out = writing("FILE", "file of factors to write (.safetensors)")
    sub = command("fit", "fit new factors to your texts", out, reading)
    inputs(sub)
    add_texts(sub)
    add_fit(sub)
    add_computing(sub)
    out = writing("FILE", "map file to write (.safetensors)")
    sub = command("map", "record the inputs of a base's modules on general text, for --map", out, of_base)
    sub.add_argument("base", metavar="BASE", nargs="+",
                     help="model directory, hub name or address")  # fmt: skip
    add_map(sub)
    add_computing(sub)
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
    sub = command("demo", "detect and remove planted intruders in a small generated model")
    sub.add_argument("--lambda", dest="mitigation_lambda", type=number, default=0.0, metavar="L",
                     help="share of the adapter's part of an intruder to keep, from 0 (remove) to 1 (unchanged) (default: 0)")  # fmt: skip
    add_amplify(sub)
    sub.add_argument(
        "-o", "--output", metavar="DIR", help="keep all files in DIR, which must not exist (default: keep nothing)"
    )
    return parser
