"""Declare every option once: a field of a dataclass, with its help, its default and its form on the command line.

The parser, completion and the man page are made from these classes (`cli.parser`); so are the keywords of the library's functions with
their docstrings (`api.calls`) and their types (``tools/make_keywords.py`` writes ``keywords.pyi``). A class that declares an option
again changes it for its command. Nothing here imports torch: ``--help`` must answer at once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

from streamer.errors import UsageError
from streamer.events import Monitor, OnEvent
from streamer.methods import DEFAULT, METHODS, WITHOUT_FILES, Method, NullSpace, make_method
from streamer.storage.files import available_cores
from streamer.units import MOST_THREADS, parse_size, quoted

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import Literal

    from streamer.adapters.adapter_config import LoraBLayout
    from streamer.detection.findings import Findings
    from streamer.evaluation.evaluation import Evaluation
    from streamer.json_types import Selection
    from streamer.measuring.facts import ProductDtype
    from streamer.methods import MethodName
    from streamer.methods.files import Coefficients, InputMap
    from streamer.output.opening import FindingsOrPath
    from streamer.output.record import MergedDtype
    from streamer.remote.inputs import RemoteMode
    from streamer.storage.checkpoint import IOMode

SeveralAdapters = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters means all adapters in it."""

Adapters = str | Path | SeveralAdapters
"""One adapter, or several."""


@dataclass(frozen=True)
class Kind:
    """What an option's value is.

    Attributes
    ----------
    words
        What a value must be, for the message about another one.
    holds
        Tests whether a value is that.
    read
        Makes a value from a text; its ValueError says what it expected.
    choices
        All values, if they are few.
    each
        Whether a list gives several values, each of this kind.
    metavar
        What help calls a value, unless the option says so.
    """

    words: str = ""
    holds: Callable[[Any], bool] = lambda value: True
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    each: bool = False
    metavar: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not of this kind."""
        for item in value if self.each and _is_list(value) else (value,):
            if not self.holds(item):
                found = quoted([*item] if isinstance(item, tuple) else item)
                raise UsageError(f"{name}: expected {self.words}, found {found}")


def text_reader(
    read: Callable[[str], Any], expected: str, meant: Callable[[str], str] = lambda text: ""
) -> Callable[[str], Any]:
    """Say of a text that cannot be read what was expected, and what it may have meant."""

    def read_or_refuse(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise ValueError(f"expected {expected}, found {quoted(text)}{meant(text)}") from None

    return read_or_refuse


def share_meant(text: str) -> str:
    """Suggest the number that a percentage or a decimal comma stands for."""
    with contextlib.suppress(ValueError):
        number = float(text.removesuffix("%").replace(",", "."))
        share = number / 100 if text.endswith("%") else number
        return f"; did you mean {share:g}?"
    return ""


read_number = text_reader(float, "a number like 0.75", share_meant)
read_integer = text_reader(int, "a whole number")


def read_numbers(text: str) -> tuple[float, ...]:
    """Read numbers that commas separate."""
    return tuple(map(read_number, text.split(",")))


def count_or_share(text: str) -> float:
    """Read a count, or with a decimal point a share."""
    return float(text) if "." in text else int(text)


def one_of(*choices: str) -> Kind:
    """Let a value be one of a few texts."""
    return Kind(f"one of {', '.join(choices)}", choices.__contains__, choices=choices)


def whole(least: int, most: float = math.inf, words: str = "a whole number") -> Kind:
    """Bound whole numbers."""
    end = "" if most == math.inf else f" to {most}"
    return Kind(
        f"{words} from {least}{end}",
        lambda n: type(n) is int and least <= n <= most,
        read_integer,
        metavar="N",
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_size(value: object) -> bool:
    return isinstance(value, str) or type(value) is int


def _lies(number: Any, above: float, to: float) -> bool:
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    return is_number and bool(above < number <= to)


def _is_rank(value: object) -> bool:
    return whole(1).holds(value) or (isinstance(value, float) and _lies(value, 0, 1))


def _rises(values: Any) -> bool:
    return (
        _is_list(values)
        and len(values) > 0
        and all(_lies(x, 0, math.inf) and x < math.inf for x in values)
        and sorted({*values}) == [*values]
    )


TEXT = Kind()
"""A text that is checked where it is used."""

FLAG = Kind()
"""True or False; on the command line, an option without a value."""

LOADED = Kind(metavar="FILE")
"""A file's path, or what has been read from it."""

NUMBER = Kind(read=read_number)
SHARE = Kind("a share in (0, 1]", lambda x: _lies(x, 0, 1), read_number, metavar="SHARE")
PART = replace(SHARE, words="a share between 0 and 1", holds=lambda x: _lies(x, 0, 1) and x < 1)
RANK = Kind(
    "a rank from 1, or a share in (0, 1] with a decimal point",
    _is_rank,
    text_reader(count_or_share, "a rank like 16 or a share like 0.95"),
    metavar="RANK",
)
COUNT_OR_SHARE = Kind(
    read=text_reader(count_or_share, "a count like 10 or a share like 0.1"), metavar="K"
)
COUNT_OR_ALL = Kind(
    "a count from 1 or 'all'",
    lambda n: n == "all" or whole(1).holds(n),
    text_reader(lambda text: text if text == "all" else int(text), "a count from 1 or 'all'"),
    metavar="N",
)
LAMBDAS = Kind(
    "a list, such as [0.75, 0.5]",
    lambda xs: isinstance(xs, Iterable) and not isinstance(xs, str),
    read_numbers,
)
RISING = Kind("rising numbers above 0", _rises, read_numbers)
NAMES = Kind("a list", LAMBDAS.holds, lambda text: text.split(","))
KEYS = Kind("a list of keys", lambda keys: _is_list(keys) and all(map(_is_text, keys)))
CLASS = Kind("the name of a class", _is_text)

PATH = Kind("a path", _is_path)
FILE = replace(PATH, metavar="FILE")
TEXT_FILE = replace(PATH, metavar="TEXT")
ADAPTERS = replace(PATH, each=True)
PATHS = Kind(
    "a path, or a list of paths",
    lambda paths: all(map(_is_path, paths if _is_list(paths) else [paths])),
)
ONE_BASE = Kind("one; to map several texts, join them in one file", _is_path)

SIZE = Kind(
    "a whole number of bytes",
    _is_size,
    text_reader(parse_size, "a size like 600M or 4G"),
    metavar="SIZE",
)
FILE_SIZE = replace(
    SIZE, read=text_reader(partial(parse_size, unit=1000), "a size like 5GB or 500M")
)
EVENTS = Kind("a function that takes an event", callable)
MONITOR = Kind("a Monitor", lambda value: isinstance(value, Monitor))
FILTER = Kind("a function that takes a name", callable)


@dataclass(frozen=True)
class Option:
    """What a field says about its option.

    Attributes
    ----------
    text
        Help, without the default.
    kind
        What a value is, on the command line and in Python.
    detail
        Further sentences for the docstring of Python's functions.
    flags
        Names on the command line; by default the field's.
    where
        Whether it is an option or a positional argument of the command line, or only a keyword in Python.
    metavar, nargs
        As for argparse; "append" for an option that may be repeated.
    required
        Whether the command line must have it.
    shown
        The default, if its value does not say it.
    rare
        Whether only `--help-all` explains it.
    """

    text: str
    kind: Kind = TEXT
    detail: str = ""
    flags: tuple[str, ...] = ()
    where: Literal["option", "argument", "keyword"] = "option"
    metavar: str | None = None
    nargs: str | None = None
    required: bool = False
    shown: str = ""
    rare: bool = False

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the field's option on the command line, if it is one."""
        if self.where != "option":
            return ()
        return self.flags or (f"--{name.replace('_', '-')}",)

    def help(self, default: Any) -> str:
        """Return the help with the default."""
        shown = self.shown
        if not shown and isinstance(default, tuple):
            shown = ",".join(f"{value:g}" for value in default)
        elif not shown and isinstance(default, int | float | str):
            is_silent = self.kind is FLAG or self.nargs == "count"
            shown = "" if is_silent else str(default)
        if not shown:
            return self.text
        return f"{self.text} (default: {shown})".replace("CORES", str(available_cores()))


def option(text: str, kind: Kind, default: Any = None, *flags: str, **form: Any) -> Any:
    """Declare an option of the command line that is also a keyword in Python."""
    return field(default=default, metadata={"option": Option(text, kind, flags=flags, **form)})


def rare(text: str, kind: Kind, default: Any = None, *flags: str, **form: Any) -> Any:
    """Declare an option that only `--help-all` explains."""
    return option(text, kind, default, *flags, rare=True, **form)


def flag(text: str) -> Any:
    """Declare an option that is False unless it is given."""
    return option(text, FLAG, False)


def argument(text: str, kind: Kind, default: Any = MISSING, **form: Any) -> Any:
    """Declare a positional argument of the command line."""
    return option(text, kind, default, where="argument", **form)


def written(text: str, metavar: str, default: Any = MISSING) -> Any:
    """Declare the output of a command; with None as the default, Python's functions need none."""
    return option(text, PATH, default, "-o", "--output", metavar=metavar, required=True)


def keyword(text: str, kind: Kind = LOADED) -> Any:
    """Declare a keyword that only Python has."""
    return option(text, kind, where="keyword")


@dataclass_transform(eq_default=False, kw_only_default=True, frozen_default=True)
class Options:
    """Base of classes of options, each of which becomes a dataclass whose fields are given by name.

    Attributes
    ----------
    group
        Heading in help of the options that the class is the first to declare.
    """

    group: ClassVar[str]

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group
        # To compile the other methods of 40 classes would double the time of `--help`.
        dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, **keywords: Any) -> None:
        declared = {field.name: field for field in fields(self)}  # type: ignore[arg-type]  # each subclass is a dataclass
        values = {name: field.default for name, field in declared.items()} | keywords
        if wrong := [name for name in values if values[name] is MISSING or name not in declared]:
            raise TypeError(f"{type(self).__name__}: missing or unknown: {', '.join(wrong)}")
        for name, value in keywords.items():
            form = declared[name].metadata.get("option")
            is_absent = value is None and declared[name].default is None
            if form is not None and not is_absent:
                form.kind.check(name, value)
        vars(self).update(values)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values."""


def declared(kind: type) -> Iterator[tuple[Any, Option, str]]:
    """List the options of a class: each field, what it declares, and the group of the class that first declared it."""
    groups: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for name in vars(base).get("__annotations__", {}):
            groups.setdefault(name, getattr(base, "group", ""))
    for option_field in fields(kind):
        if "option" in option_field.metadata:
            yield option_field, option_field.metadata["option"], groups[option_field.name]


ONE_ADAPTER = "directory, hub name or address of a PEFT adapter; only one"
SEVERAL_ADAPTERS = "directory, hub name or address of a PEFT adapter. Several, or a directory of them, share one pass over the base"
FINDINGS = "findings from `streamer detect`"
RANK_OR_SHARE = (
    "A share such as 0.95 uses the smallest rank that keeps this share of each delta's energy"
)
SEVERAL = "for several adapters, a directory that gets one"
BUILT_IN_TITLE = "a built-in text of prose, chat and code"
BESIDE = "of the recorded name, beside OUTPUT"
MEMORY = "memory limit, such as 600M or 4G, not counting memory-mapped files and the GPU driver"
COUNTED = (
    "It is in bytes, or a size like 4G in powers of 1024, and counts the anonymous memory of Python, torch and streamer; 200M (350M with "
    "torch for GPUs) are needed before any matrix."
)
CARD = "do not describe in the model card (README.md) how the output was made"


class Watched(Options):
    """How a call in Python is watched."""

    on_event: OnEvent | None = keyword(
        "function to call with an `Event` at each step and for each warning; without it and `monitor`, "
        "warnings are `StreamerWarning`",
        EVENTS,
    )
    monitor: Monitor | None = keyword(
        "a `Monitor` instead of `on_event`, for callers that also need to stop a run at its next safe point",
        MONITOR,
    )
    progress: bool | None = keyword(
        "True draws tqdm bars; None draws them only in a notebook, and only without `on_event` and `monitor`"
    )


class Printing(Options, group="printing"):
    """What a command prints."""

    json: bool = flag("print one JSON object to stdout, even on failure. See docs/formats.md")
    json_events: bool = rare(
        "print one JSON object per line to stderr instead of progress, warnings and errors",
        FLAG,
        False,
    )
    quiet: int = option(
        "print only warnings and errors; -qq: only errors", TEXT, 0, "-q", "--quiet", nargs="count"
    )
    progress: str = rare(
        "how to show progress: a bar, or a line every 30 s (plain); auto: bar on a terminal, else plain",
        one_of("auto", "bar", "plain", "none"),
        "auto",
    )
    all: bool = rare(
        "show every row and column of tables, not only the most important ones",
        FLAG,
        False,
    )
    legend: bool = rare(
        "omit the lines that explain the columns of tables", FLAG, True, "--no-legend"
    )


class OfBase(Watched, group="input"):
    """How a base is read."""

    base: str | Path = argument("directory of model or pipeline, file, hub name or address", PATH)
    io: IOMode = rare(
        "how to read tensors; use pread on network file systems",
        one_of("mmap", "pread"),
        "mmap",
    )
    remote: RemoteMode | None = rare(
        "how to read an input at an address. cache: download what is needed before starting; stream: read "
        "byte ranges and store nothing (if not given: cache for the hub, else stream)",
        one_of("cache", "stream"),
    )
    architecture: str | None = rare(
        "class of BASE in transformers, such as GPT2LMHeadModel; needed only if a message asks for it",
        CLASS,
        metavar="NAME",
    )


class Ignoring(Options, group="input"):
    """Keys of an adapter's config that have no effect."""

    ignore_keys: Sequence[str] = rare(
        "ignore the unknown key KEY of the adapter's config (repeatable)",
        KEYS,
        (),
        "--ignore-key",
        metavar="KEY",
        nargs="append",
    )


class OfAdapter(Ignoring, OfBase, group="input"):
    """How a base and an adapter are read, and facts that they do not contain."""

    base_is_residual: bool = rare(
        "BASE is the residual of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ, on which ADAPTER was trained",
        FLAG,
        False,
    )
    lora_b_layout: LoraBLayout | None = rare(
        "order of lora_B's columns for stacked experts, if ADAPTER does not state it: rank_major "
        "(PEFT), or grouped_by_expert (Unsloth until September 2026)",
        one_of("rank_major", "grouped_by_expert"),
    )


class OnDevice(Options, group="computing"):
    """Where a run computes."""

    device: str = rare(
        "where to compute: cpu, cuda or cuda:i (cuda has not been run on a GPU yet); auto: run detection on a "
        "GPU if there is one, and models on the CPU",
        TEXT,
        "auto",
        metavar="DEV",
    )


class Computing(OnDevice, group="computing"):
    """Where a run computes, and with how much memory."""

    max_memory: int | str | None = option(
        f"{MEMORY}. With a low limit, large matrices take longer, and directions that need a full SVD "
        "are left undecided; what does not fit is refused",
        SIZE,
        shown="no limit",
        detail=COUNTED,
    )


class Threads(Options, group="computing"):
    """Threads of a command; in Python, torch's own."""

    threads: int | None = rare(
        "CPU threads",
        whole(1, MOST_THREADS, "a number"),
        shown="OMP_NUM_THREADS, or one per core available to this process, CORES here",
    )


class Judged(Options, group="detection"):
    """What counts as an intruder; None means the value in the findings, or the default."""

    top_k: int | float | None = rare(
        "leading directions to examine in each matrix, as a count or as a share such as 0.1",
        COUNT_OR_SHARE,
        shown="10, or as in the findings given",
        detail="A count is an int from 1, a share of min(rows, columns) a float in (0, 1].",
    )
    threshold_epsilon: float | None = rare(
        "a direction is an intruder if its similarity to the base is below E",
        NUMBER,
        None,
        "--epsilon",
        metavar="E",
        shown="0.5, or as in the findings given",
        detail="E is in (0, 1]; the similarity is the largest |cosine| to a left "
        "singular vector of the base.",
    )
    solver: str | None = rare(
        "Krylov with bounds (certified), LAPACK's full SVD (dense), or the cheaper one (auto)",
        one_of("auto", "certified", "dense"),
        shown="auto, or as in the findings given",
    )


class Writing(Options, group="output"):
    """What happens to an output that exists, whole or in part."""

    output: str | Path | None = written("", "PATH", None)
    resume: bool = rare(
        "start over instead of resuming an interrupted run", FLAG, True, "--no-resume"
    )
    overwrite: bool = flag(
        "replace an existing output, or write into a directory with other files. Unrelated files are kept; the run is "
        "refused if one of them has a name that the output needs or a loader would read",
    )


class DryRuns(Options, group="output"):
    """A command that can be tried."""

    dry_run: bool = flag(
        "check inputs and options, forecast memory, disk and time, and write nothing"
    )


class WorkerOptions(Options, group="workers (docs/workers.md)"):
    """Workers of a command; Python's functions take an executor."""

    workers: int | None = rare(
        "compute in N processes that share the cores and --max-memory",
        whole(1, words="a number"),
        shown="in this process",
    )
    executor: str | None = rare(
        "compute on the workers of a cluster: dask:HOST:PORT, dask:FILE.json (its scheduler file), ray:auto or "
        "ray:HOST:PORT; --threads and --max-memory apply to each task",
        TEXT,
        metavar="ENGINE:ADDRESS",
    )


class DetectOptions(Writing, Judged, Computing, OfAdapter):
    """Options of `detect_intruder_dimensions`."""

    adapter: Adapters = argument(SEVERAL_ADAPTERS, ADAPTERS, nargs="+")
    output: str | Path | None = written(
        f"findings file to write (.safetensors); {SEVERAL} NAME.safetensors per adapter",
        "FILE",
        None,
    )
    executor: Executor | None = keyword("")


class Scaling(Options, group="mitigation"):
    """What methods need."""

    amplify: bool = rare(
        "allow a lambda outside [0, 1]: above 1 enlarges an intruder, below 0 changes its sign",
        FLAG,
        False,
    )
    coefficients: Coefficients | str | Path | None = rare(
        "factors from `streamer repair`, for method regmean, which uses neither "
        "detection nor --lambda",
        LOADED,
    )
    map: InputMap | str | Path | None = option(
        "map of BASE from `streamer map`, for method nullspace, which uses no detection",
        LOADED,
    )
    select: Selection = rare(
        "scale all intruders among the top k, or only the highest-ranked one of each matrix",
        one_of("all", "first"),
        "all",
        "--select",
        "--scale",
    )

    def files(self) -> dict[str, Any]:
        """Return the coefficients and the map that are given, read from their files if paths are given."""
        from streamer.methods import files  # it loads torch

        loaders = {"coefficients": files.load_coefficients, "map": files.load_map}
        read = files.Coefficients | files.InputMap
        values = {name: value for name in loaders if (value := getattr(self, name)) is not None}
        return {name: v if isinstance(v, read) else loaders[name](v) for name, v in values.items()}


class MethodOptions(Scaling, group="mitigation"):
    """A mitigation method."""

    mitigation_lambda: float | None = option(
        "share of each intruder (project: of the adapter's part; shrink: of the adapter) to keep, "
        "from 0 (remove) to 1 (keep). With --map: share of each delta's energy on general inputs",
        NUMBER,
        None,
        "--lambda",
        metavar="L",
        shown=f"{DEFAULT.mitigation_lambda:g}, with a map {NullSpace.mitigation_lambda:g}",
    )
    method: MethodName | None = option(
        "; ".join(f"{name}: {METHODS[name].about}" for name in WITHOUT_FILES)
        + ". With --coefficients "
        "or --map, the file sets the method",
        one_of(*METHODS),
        metavar="NAME",
        shown=f"in Python {DEFAULT.name}",
        detail="The mitigated delta "
        "is Δ + (λ − 1) U Σ Vᵀ (paper), (I − (1 − λ) U Uᵀ) Δ (project), λ Δ (shrink) or L R'ᵀ with new right factors (regmean).",
    )

    @cached_property
    def chosen(self) -> Method:
        """Make the method, and read its coefficients or its map.

        Raises
        ------
        UsageError
            If coefficients are combined with a λ or another method, or if λ is refused.
        """
        given = {
            f.name: value
            for f in fields(MethodOptions)
            if (value := getattr(self, f.name)) != f.default
        }
        given |= self.files()
        return make_method(given.pop("method", None), **given)


class Mitigating(MethodOptions, Judged, Computing, OfAdapter, group="mitigation"):
    """A mitigation method, and the findings that it may need."""

    findings: FindingsOrPath = option(
        f"{FINDINGS} (a directory for several adapters); without it, detection runs first if the "
        "method needs it",
        LOADED,
    )


class Dequantizing(Options):
    """A model in plain tensors."""

    dequantize: bool = flag(
        "if the base is quantized, write a plain model, in the dtype of its config"
    )


class WritingOptions(Writing, Mitigating, group="output"):
    """What mitigate and merge share."""

    adapter: Adapters = argument(SEVERAL_ADAPTERS, ADAPTERS, nargs="+")
    model_card: bool = rare(CARD, FLAG, True, "--no-card")


class Serving(Options, group="output"):
    """An adapter that servers apply as PEFT does."""

    for_server: bool = flag(
        "for vLLM, SGLang and llama.cpp, which ignore some scales: one rank and scale 1 for all modules",
    )


class MitigateOptions(Serving, WritingOptions):
    """Options of `reduce_intruder_dimension`."""

    output: str | Path = written(
        f"adapter directory to write; {SEVERAL} subdirectory NAME per adapter", "DIR"
    )
    to_lora: int | float | None = option(
        f"write a LoRA adapter of this rank from any kind of adapter. {RANK_OR_SHARE}",
        RANK,
    )


class MergeOptions(Dequantizing, WritingOptions):
    """Options of `merge_with_reduced_intruder_dimensions`."""

    output: str | Path = written(
        f"model directory to write; {SEVERAL} subdirectory NAME per adapter", "DIR"
    )
    requantize: InputMap | str | Path | None = rare(
        "if the base is in 4 bits, write merged weights in its codes again; needs a map of "
        "BASE from `streamer map`",
        LOADED,
        metavar="MAP",
    )
    dtype: MergedDtype | None = option(
        "write plain floating-point tensors in this dtype, but not those stored wider than most",
        one_of("bf16", "fp16", "fp32"),
        metavar="DTYPE",
        shown="the base's",
        detail="bf16, fp16 or fp32.",
    )
    max_shard_size: str | int | None = option(
        "largest size of a file, like 5GB",
        FILE_SIZE,
        shown="the base's files",
        detail="GB is 1000³ bytes, as in transformers; GiB is 1024³.",
    )
    executor: Executor | None = keyword("workers that write shards")


class IterateOptions(Dequantizing, Mitigating):
    """Options of `iter_merged`."""

    tensors: Callable[[str], bool] | None = keyword(
        "function that tells from its name whether to make and yield a tensor", FILTER
    )


class Products(Computing, group="computing"):
    """Where and how a sweep multiplies."""

    device: str = rare(
        "where to run the model: cpu, cuda or cuda:i (cuda has not been run on a GPU yet); auto: the CPU",
        TEXT,
        "auto",
        metavar="DEV",
    )
    max_memory: int | str | None = rare(
        f"{MEMORY}. With a low limit, fewer sequences run together, and their states go to a temporary "
        "file; what does not fit is refused",
        SIZE,
        shown="no limit",
        detail=COUNTED,
    )
    dtype: ProductDtype = rare(
        "dtype of products with base weights; bf16 is faster on some processors",
        one_of("float32", "bf16"),
        "float32",
    )


class Reading(Products):
    """How much of texts a sweep reads."""

    sequences: int = option("maximum number of sequences per text", whole(2), 32)
    length: int = option("maximum number of tokens per sequence", whole(2), 128)


class Texts(Reading):
    """Two texts."""

    general: str | Path | None = option(
        "general text, for measuring forgetting: .txt, .jsonl or .npy",
        TEXT_FILE,
        shown=f"{BUILT_IN_TITLE}; your own text works better",
    )
    task: str | Path | None = option(
        "text from ADAPTER's task but not from its training data",
        TEXT_FILE,
        shown="text that ADAPTER writes",
    )
    prompts: str | Path | None = rare(
        "without --task: lines with which the text that ADAPTER writes begins, for adapters that answer: "
        ".txt, or .jsonl with prompt or messages",
        FILE,
        shown="the base's tokens between texts",
    )
    seed: int = rare("without --task: decides what ADAPTER writes", whole(0), 1)


class VariantOptions(Scaling, Products, OfAdapter):
    """Variants of a model that are measured."""

    adapter: str | Path = argument(ONE_ADAPTER, PATH)
    findings: Findings | str | Path | None = option(
        f"{FINDINGS}; paper and project need them", LOADED
    )
    lambdas: Sequence[float] = option(
        "shares to keep, separated by commas", LAMBDAS, (0.75, 0.5), "--lambda", metavar="L,L"
    )
    methods: Sequence[MethodName] | None = option(
        f"one or several of {', '.join(WITHOUT_FILES)}, separated by commas (default: shrink, "
        "and with --findings paper too); to evaluate only --coefficients, give their method, regmean",
        NAMES,
        None,
        "--method",
        metavar="M,M",
    )
    keep: float = rare(
        "share of the learning that the suggestion must keep",
        SHARE,
        0.9,
    )
    projected: bool = rare(
        "evaluate deltas projected onto the adapter's rank, as `mitigate` writes them",
        FLAG,
        False,
    )


class EvaluateOptions(Writing, Texts, VariantOptions):
    """Options of `evaluate_variants`."""

    output: str | Path | None = option(
        "JSON file to write; new variants are added to an evaluation of the same inputs, texts and options",
        FILE,
        None,
        "-o",
        "--output",
        shown="print alone, and keep nothing",
    )
    other: str | Path | Sequence[str | Path] = option(
        "another text to measure; it does not affect the suggestion (repeatable)",
        PATHS,
        (),
        metavar="TEXT",
        nargs="append",
    )


class MappingOptions(Writing, Reading, OfBase):
    """Options of `map_inputs`."""

    output: str | Path | None = written("map file to write (.safetensors)", "FILE", None)
    base: str | Path = argument("model directory, hub name or address", PATH, nargs="+")
    general: str | Path | None = option(
        "general text to run through BASE: .txt, .jsonl or .npy",
        TEXT_FILE,
        shown=BUILT_IN_TITLE,
    )
    vectors: int = rare("leading vectors to store for each input", whole(1), 16)


class RepairOptions(Serving, Writing, Texts, OfAdapter):
    """Options of `repair_adapter`."""

    adapter: str | Path = argument(ONE_ADAPTER, PATH)
    output: str | Path = written("directory to write: an adapter, or with --merge a model", "DIR")
    keep: float = option("least share of the learning to keep", SHARE, 0.9)
    weights: Sequence[float] = rare(
        "weights of the general text to fit and measure, rising",
        RISING,
        (0.5, 8.0),
        "--mu",
        metavar="M,M",
    )
    sequences: int = option(
        "maximum number of sequences per text, but twice as many of the built-in text",
        whole(4),
        24,
    )
    length: int = option("maximum number of tokens per sequence", whole(2), 64)
    holdout: float = rare(
        "share of each text's sequences to hold out for choosing and measuring",
        PART,
        0.33,
    )
    seed: int = rare(
        "decides which sequences are held out, and without --task what ADAPTER writes",
        whole(0),
        0,
    )
    to_lora: int | float | None = option(
        "first write ADAPTER, of any kind, as a LoRA adapter of this rank, beside DIR. "
        + RANK_OR_SHARE,
        RANK,
    )
    merge: bool = flag("write a model with the repaired adapter merged in")
    dequantize: bool = rare(
        "with --merge: if the base is quantized, write a plain model", FLAG, False
    )
    model_card: bool = rare(CARD, FLAG, True, "--no-card")


class InspectOptions(OfAdapter):
    """Options of `streamer inspect`."""

    adapter: str | Path = argument(ONE_ADAPTER, PATH)


class ReportOptions(Options):
    """Options of `write_report`."""

    findings: Findings | Evaluation | str | Path = argument(
        "findings file from `streamer detect`, an evaluation, or an output's directory", LOADED
    )
    output: str | Path | None = option(
        "page to write, a name that ends in .html", PATH, None, "-o", "--output", metavar="PAGE"
    )
    overwrite: bool = flag("replace an existing report; no other file is ever replaced")


class VerifyOptions(Watched):
    """Options of `verify_output`."""

    output: str | Path = argument("directory of one merged model or mitigated adapter", PATH)
    base: str | Path | None = argument(
        "base of OUTPUT: also recompute a sample of matrices", PATH, None, nargs="?"
    )
    adapter: str | Path | None = argument(
        "the adapter; give it together with BASE", PATH, None, nargs="?"
    )
    sample: int | Literal["all"] = option(
        "number of matrices to recompute, spread over their kinds; all: recompute every matrix and "
        "compare every other tensor byte by byte",
        COUNT_OR_ALL,
        3,
    )
    coefficients: str | Path | None = option(
        "file of the fit that OUTPUT was made with", FILE, shown=BESIDE
    )
    map: str | Path | None = option("map that OUTPUT was made with", FILE, shown=BESIDE)


class DemoOptions(Options):
    """Options of `streamer demo`."""

    output: str | Path | None = option(
        "keep all files in DIR, which must not exist",
        PATH,
        None,
        "-o",
        "--output",
        metavar="DIR",
        shown="keep nothing",
    )


class LiveOptions(Judged, OnDevice, Ignoring, Watched):
    """Options of functions on a model in memory."""


class LiveMitigation(MethodOptions, LiveOptions):
    """Options of functions that mitigate a model in memory."""

    findings: Findings | str | Path | None = keyword("")
