"""Make the parser, its help and shell completion from the declared options (`streamer.options`), and word its errors."""

from __future__ import annotations

import argparse
import copy
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, NoReturn

from streamer import __version__, options
from streamer.options import FLAG, Option, declared
from streamer.units import quoted


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


THREADS_INSTEAD = ", which only detect and merge have; other commands use --threads, and several adapters are several runs"


class Parser(argparse.ArgumentParser):
    """Parser that raises `BadUsage` and accepts no abbreviations, because a new option could break them."""

    def __init__(self, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=raw, **options)
        self.add_argument("-h", "--help", action=_Help, help="show what most people need")
        self.add_argument("--help-all", action=_Help, help="show all options, and the exit codes")

    def error(self, message: str) -> NoReturn:
        """Raise `BadUsage`."""
        message = message.removeprefix("argument ")
        raise BadUsage(
            message if "did you mean" in message else f"{message}; see `{self.prog} --help-all`"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but first refuse unknown options: argparse would report a missing argument for a misspelt option."""
        words: Iterable[str] = args or ()
        if self._subparsers is not None:
            words = takewhile(lambda arg: arg.startswith("-"), words)
        known = self._option_string_actions
        for arg in takewhile(lambda arg: arg != "--", words):
            name, _, _ = arg.partition("=")
            if name.startswith("--") and " " not in name and name not in known:
                instead = _closest(name, known)
                if name in ("--workers", "--executor"):
                    instead = THREADS_INSTEAD
                self.error(f"unknown option {quoted(name)}{instead}")
        arguments, others = super().parse_known_args(args, namespace)
        if others and self._subparsers is None:
            kind = "unknown option" if others[0].startswith("-") else "unexpected argument"
            self.error(f"{kind} {quoted(others[0])}")
        return arguments, others

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [*map(str, action.choices)]
            near = _closest(str(value), choices)
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(choices)}, found {quoted(value)}{near}"
            )


class _Help(argparse._HelpAction):
    """Print the help and exit: all of it with `--help-all`, else what most people need."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: Any = None,
    ) -> None:
        text = parser.format_help() if option_string == "--help-all" else _short_help(parser)
        parser._print_message(text, sys.stdout)
        parser.exit()


def _short_help(parser: argparse.ArgumentParser) -> str:
    """Format the arguments, and in one list the options that most people need, each with the first sentence of its help."""
    actions = [
        copy.copy(action) for group in parser._action_groups for action in group._group_actions
    ]
    for action in actions:
        action.help = re.sub(r"(?<=[\w)`])\. .*?(?= \(default|$)", "", action.help or "")
    arguments = [action for action in actions if not action.option_strings]
    common = [
        action for action in actions if action.option_strings and not getattr(action, "rare", False)
    ]
    text = parser._get_formatter()
    usage = parser._get_formatter()
    usage.add_usage(None, [a for a in actions if not a.option_strings or a.required], [])
    text.add_usage(f"{usage.format_help().removeprefix('usage: ').rstrip()} [...]", [], [])
    text.add_text(parser.description)
    for title, shown in (("positional arguments", arguments), ("options", common)):
        text.start_section(title)
        text.add_arguments(shown)
        text.end_section()
    text.add_text((parser.epilog or "").removesuffix(EXIT_CODES).rstrip())
    return text.format_help()


def _closest(word: str, names: Iterable[str]) -> str:
    """Suggest the closest name, if one is close."""
    by_letters = {name.strip("-"): name for name in names}
    close = difflib.get_close_matches(word.strip("-"), by_letters, n=1)
    return f"; did you mean {by_letters[close[0]]}?" if close else ""


def argument_reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make argparse say why a text cannot be read."""

    def read_or_refuse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return read_or_refuse


DESCRIPTION = """\
Make a LoRA adapter forget less of its base model, one matrix at a time. An
intruder dimension is one of the largest singular directions of a fine-tuned
matrix that resembles none of the base's.
"""

EXIT_CODES = """\
exit codes: 0 done, 1 unexpected error, 2 usage, 3 bad or inconsistent input,
4 output exists or does not match, 5 locked by another run, 6 I/O, space, or
lost workers, 7 numeric or verification failure, 8 input changed during the run,
128+N stopped by signal N; after 6 and 128+N, the same command resumes
"""

FIRST_RUN = """\
a first run:
  streamer inspect BASE ADAPTER
      see which tensor each module changes
  streamer repair BASE ADAPTER -o DIR
      write an adapter that forgets less, and measure it; it is better with
      text of its task (--task TEXT)
  streamer merge BASE DIR -o MODEL
      write a plain model with that adapter merged in
  streamer evaluate BASE ADAPTER -o FILE
      measure what shrinking the adapter keeps and forgets

BASE is a model directory or a .safetensors file, ADAPTER the directory of a
PEFT adapter; both can be hub names or addresses. detect, mitigate and merge
accept several adapters and read the base once; other commands accept one.
Results go to stdout, progress to stderr.
"""

EPILOG = f"{FIRST_RUN}\n{EXIT_CODES}"

EXAMPLES = {
    "inspect": "  streamer inspect BASE ADAPTER\n",
    "detect": """\
  streamer detect BASE ADAPTER -o findings.safetensors
  streamer detect BASE ADAPTER1 ADAPTER2 -o found
      writes found/ADAPTER1.safetensors and found/ADAPTER2.safetensors
""",
    "mitigate": """\
  streamer mitigate BASE ADAPTER -o half --method shrink --lambda 0.5
  streamer mitigate BASE ADAPTER -o mild --method paper --findings f.safetensors
  streamer mitigate BASE ADAPTER -o as-lora --lambda 1 --to-lora 32
  streamer mitigate BASE ADAPTER -o reduced --map base.map.safetensors
      apply a map of BASE, made once for all its adapters
""",
    "merge": """\
  streamer merge BASE ADAPTER -o merged --lambda 1
  streamer merge BASE REPAIRED -o plain --dequantize
""",
    "report": """\
  streamer report findings.safetensors
  streamer report evaluation.json -o report.html
  streamer report OUTPUT
""",
    "verify": """\
  streamer verify merged
      checks sizes and digests against the record
  streamer verify merged BASE ADAPTER --sample all
      recomputes every matrix, and compares every other tensor byte by byte
""",
    "evaluate": "  streamer evaluate BASE ADAPTER --task chats.jsonl -o e.json\n",
    "map": "  streamer map BASE --general web.txt -o base.map.safetensors\n",
    "repair": """\
  streamer repair BASE ADAPTER -o repaired
  streamer repair BASE ADAPTER --task t.jsonl -o repaired
  streamer repair BASE ADAPTER --task t.jsonl -o repaired --to-lora 32
      also for DoRA, LoHa, LoKr and fine-tuned models
""",
    "demo": "  streamer demo\n  streamer demo -o demo\n      keeps the model, the outputs and the page\n",
}


class _PrintCompletion(argparse.Action):
    """Print the completion script of a shell (``bash``, ``zsh`` or ``tcsh``) and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: Any = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(
                f"{option_string}: needs shtab, which is not installed: pip install 'intruder-streamer[completion]'"
            )
        completes = dict.fromkeys(("BASE", "FILE", "FINDINGS", "EVALUATION", "PAGE"), shtab.FILE)
        completes |= dict.fromkeys(("ADAPTER", "DIR"), shtab.DIRECTORY)
        (commands,) = (
            action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        )
        for action in (action for sub in commands.choices.values() for action in sub._actions):
            if action.metavar in completes:
                action.complete = completes[action.metavar]
        print(shtab.complete(parser, values))
        parser.exit()


def named_as_option(message: str) -> str:
    """Replace the library's keywords by options: a keyword that begins a message, and flags like ``amplify=True``."""
    head, colon, rest = re.sub(r"`(\w+)=True`", r"`--\1`", message).partition(": ")
    flags: dict[str, str] = {}
    for kind in (kind for _, kinds in COMMANDS.values() for kind in kinds):
        for field, option, _ in declared(kind):
            flag, *_ = option.names(field.name) or [field.name.upper()]
            flags |= {field.name: flag, flag.removeprefix("--"): flag}
    return f"{flags.get(head, head)}{colon}{rest}"


RUNS = (options.DryRuns, options.Threads)
DIVIDED = (*RUNS, options.WorkerOptions)

COMMANDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "inspect": ("show which tensor each module of an adapter changes", (options.InspectOptions,)),
    "detect": (
        "find the intruder dimensions and write them to a file",
        (options.DetectOptions, *DIVIDED),
    ),
    "mitigate": ("write a mitigated adapter", (options.MitigateOptions, *RUNS)),
    "merge": (
        "write the base with the mitigated adapter merged in",
        (options.MergeOptions, *DIVIDED),
    ),
    "report": ("show findings or an output as a table, JSON or a page", (options.ReportOptions,)),
    "verify": (
        "check an output against its record and its inputs, with independent code",
        (options.VerifyOptions,),
    ),
    "evaluate": (
        "measure what the adapter and its shrinks keep and forget",
        (options.EvaluateOptions, *RUNS),
    ),
    "map": (
        "record the inputs of a base's modules on general text, for --map",
        (options.MappingOptions, *RUNS),
    ),
    "repair": (
        "write an adapter that forgets less, and measure it",
        (options.RepairOptions, *RUNS),
    ),
    "demo": ("run these commands on a small model that is included", (options.DemoOptions,)),
}
"""What each command does, and the classes of its options; `Printing` is every command's."""

GROUPS = (
    "output",
    "mitigation",
    "detection",
    "computing",
    "workers (docs/workers.md)",
    "input",
    "printing",
)
"""Order of the groups in help, below the arguments and the options of no group."""


def build_parser(first: str = "") -> Parser:
    """Build the parser from the declared options; if the first argument is a command, without those of the others, to save time."""
    parser = Parser(prog="streamer", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"streamer {__version__}")
    completion: Any = parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        metavar="SHELL",
        help="print a completion script for bash, zsh or tcsh and exit; needs the extra [completion]",
    )
    completion.rare = True
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (about, kinds) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"examples:\n{EXAMPLES[name]}\n{EXIT_CODES}",
        )
        sub.set_defaults(default_method=False)
        groups = {"": sub, **{title: sub.add_argument_group(title) for title in GROUPS}}
        if first != name and first in COMMANDS:
            continue
        for kind in (*kinds, options.Printing):
            for field, option, group in declared(kind):
                if option.where != "keyword":
                    _add(groups[group if option.where == "option" else ""], field, option)
    return parser


def _add(group: Any, field: Any, option: Option) -> None:
    """Add an option or an argument in the form that its declaration says."""
    form: dict[str, Any] = {"help": option.help(field.default), "default": field.default}
    if option.where == "argument":
        metavar = option.metavar or field.name.upper()
        group.add_argument(field.name, metavar=metavar, nargs=option.nargs, **form)
        return
    if option.required:
        form |= {"required": True, "default": None}
    if option.kind is FLAG:
        form["action"] = "store_false" if field.default else "store_true"
    elif option.nargs == "count":
        form["action"] = "count"
    elif option.nargs == "append":
        form |= {"action": "append", "metavar": option.metavar, "default": [*field.default]}
    else:
        form |= {
            "metavar": option.metavar or option.kind.metavar,
            "choices": option.kind.choices,
            "type": argument_reader(option.kind.read),
        }
    group.add_argument(*option.names(field.name), dest=field.name, **form).rare = option.rare
