"""Declare every option once: a field of a dataclass, with its help, its default and its form on the command line.

The parser, completion and the man page are made from these classes (`cli.parser`); so are the keywords of the library's functions with
their docstrings (`api.calls`) and their types (``tools/make_keywords.py`` writes ``keywords.pyi``). A class that declares an option
again changes it for its command. Nothing here imports torch: ``--help`` must answer at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast, dataclass_transform

from streamer.errors import UsageError
from streamer.events import Monitor, OnEvent
from streamer.methods import DEFAULT, METHODS, WITHOUT_FILES, Method, NullSpace, make_method
from streamer.storage.files import available_cores
from streamer.units import MOST_THREADS, quoted

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import Literal

    from streamer.adapters.adapter_config import LoraBLayout
    from streamer.detection.findings import Findings
    from streamer.evaluation.evaluation import Evaluation, ProductDtype
    from streamer.json_types import Selection
    from streamer.methods import MethodName
    from streamer.methods.files import Coefficients, InputMap
    from streamer.output.job import FindingsOrPath
    from streamer.output.record import MergedDtype
    from streamer.remote.inputs import RemoteMode
    from streamer.storage.checkpoint import IOMode

SeveralAdapters = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters means all adapters in it."""

Adapters = str | Path | SeveralAdapters
"""One adapter, or several."""


class Bound(NamedTuple):
    """What a value must be: in words, for the message about another one, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(least: int, most: float = math.inf, words: str = "a whole number") -> Bound:
    """Bound whole numbers."""
    end = "" if most == math.inf else f" to {most}"
    return Bound(f"{words} from {least}{end}", lambda n: type(n) is int and least <= n <= most)


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str)


def _lies(number: Any, above: float, to: float) -> bool:
    return (
        isinstance(number, Real)
        and not isinstance(number, bool)
        and bool(above < cast(Any, number) <= to)
    )


SHARE = Bound("a share in (0, 1]", lambda x: _lies(x, 0, 1))
PART = Bound("a share between 0 and 1", lambda x: _lies(x, 0, 1) and x < 1)
RANK = Bound(
    "a rank from 1, or a share in (0, 1] with a decimal point",
    lambda x: whole(1).holds(x) or (isinstance(x, float) and _lies(x, 0, 1)),
)
RISING = Bound(
    "rising numbers above 0",
    lambda xs: (
        _is_list(xs)
        and len(xs) > 0
        and all(_lies(x, 0, math.inf) and x < math.inf for x in xs)
        and sorted({*xs}) == [*xs]
    ),
)

PATH = Bound("a path", lambda path: isinstance(path, str | os.PathLike))
PATHS = Bound(
    "a path, or a list of paths",
    lambda paths: all(map(PATH.holds, paths if _is_list(paths) else [paths])),
)
ONE_BASE = Bound(
    "one; to map several texts, join them in one file",
    lambda path: isinstance(path, str | os.PathLike),
)
BYTES = Bound("a whole number of bytes", lambda size: isinstance(size, str) or type(size) is int)
KEYS = Bound(
    "a list of keys", lambda keys: _is_list(keys) and all(isinstance(key, str) for key in keys)
)


@dataclass(frozen=True)
class Option:
    """What a field says about its option.

    Attributes
    ----------
    text
        Help, without the default.
    detail
        Further sentences for the docstring of Python's functions.
    flags
        Names on the command line; by default the field's.
    where
        Whether it is an option or a positional argument of the command line, or only a keyword in Python.
    metavar, nargs, choices
        As for argparse; "append" for an option that may be repeated.
    shown
        The default, if its value does not say it.
    expects
        What a value is, for the message about a text that is none.
    bound
        What values it takes, on the command line and in Python; of several values, each.
    rare
        Whether only `--help-all` explains it.
    """

    text: str
    detail: str = ""
    flags: tuple[str, ...] = ()
    where: Literal["option", "argument", "keyword"] = "option"
    metavar: str | None = None
    nargs: str | None = None
    choices: Sequence[str] | None = None
    shown: str = ""
    expects: str = ""
    bound: Bound | None = None
    rare: bool = False

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the field's option on the command line, if it is one."""
        return (self.flags or (f"--{name.replace('_', '-')}",)) if self.where == "option" else ()

    def help(self, default: Any) -> str:
        """Return the help with the default."""
        if isinstance(default, tuple | list):
            default = ",".join(f"{value:g}" for value in default)
        silent = self.nargs == "count" or any(
            default is value for value in (MISSING, None, True, False)
        )
        shown = self.shown or ("" if silent else str(default))
        return (
            f"{self.text} (default: {shown})".replace("CORES", str(available_cores()))
            if shown
            else self.text
        )


def option(text: str, default: Any = None, *flags: str, **form: Any) -> Any:
    """Declare an option of the command line that is also a keyword in Python."""
    return field(default=default, metadata={"option": Option(text, flags=flags, **form)})


def argument(text: str, default: Any = MISSING, **form: Any) -> Any:
    """Declare a positional argument of the command line."""
    return option(text, default, where="argument", **form)


def written(text: str, metavar: str) -> Any:
    """Declare the output of a command."""
    return option(text, MISSING, "-o", "--output", metavar=metavar)


def keyword(text: str, bound: Bound | None = None) -> Any:
    """Declare a keyword that only Python has."""
    return option(text, where="keyword", bound=bound)


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
        values = {**{name: field.default for name, field in declared.items()}, **keywords}
        if wrong := [name for name in values if values[name] is MISSING or name not in declared]:
            raise TypeError(f"{type(self).__name__}: missing or unknown: {', '.join(wrong)}")
        for name, value in keywords.items():
            _check(declared[name], value)
        vars(self).update(values)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values."""


def _check(option_field: Any, value: Any) -> None:
    """Refuse a value that its field's bound, choices or type exclude."""
    kind, form = str(option_field.type), option_field.metadata.get("option", Option(""))
    bound: Bound | None = form.bound
    if value is None and kind.endswith("| None") and option_field.default is not MISSING:
        return
    values = value if kind.startswith(("float |", "Adapters")) and _is_list(value) else (value,)
    if bound is None and form.choices is not None and not kind.startswith("Sequence"):
        bound = Bound(f"one of {', '.join(form.choices)}", tuple(form.choices).__contains__)
    elif bound is None and kind.startswith("Sequence["):
        example = f", such as {[*option_field.default]}" if option_field.default else ""
        bound = Bound(
            f"a list{example}",
            lambda values: isinstance(values, Iterable) and not isinstance(values, str),
        )
    elif bound is None and kind.removesuffix(" | None") in ("str | Path", "Adapters"):
        bound = PATH
    for item in values:
        if bound is not None and not bound.holds(item):
            found = quoted([*item] if isinstance(item, tuple) else item)
            raise UsageError(f"{option_field.name}: expected {bound.words}, found {found}")


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
ADAPTERS = "directory, hub name or address of a PEFT adapter. Several, or a directory of them, share one pass over the base"
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


# fmt: off
class Watched(Options):
    """How a call in Python is watched."""

    on_event: OnEvent | None = keyword("function to call with an `Event` at each step and for each warning; without it and `monitor`, "
        "warnings are `StreamerWarning`", Bound("a function that takes an event", callable))
    monitor: Monitor | None = keyword("a `Monitor` instead of `on_event`, for callers that also need to stop a run at its next safe point",
        Bound("a Monitor", lambda monitor: isinstance(monitor, Monitor)))
    progress: bool | None = keyword("True draws tqdm bars; None draws them only in a notebook, and only without `on_event` and `monitor`")


class Printing(Options, group="printing"):
    """What a command prints."""

    json: bool = option("print one JSON object to stdout, even on failure. See docs/formats.md", False)
    json_events: bool = option("print one JSON object per line to stderr instead of progress, warnings and errors", False, rare=True)
    quiet: int = option("print only warnings and errors; -qq: only errors", 0, "-q", "--quiet", nargs="count")
    progress: str = option("how to show progress: a bar, or a line every 30 s (plain); auto: bar on a terminal, else plain", "auto",
        choices=["auto", "bar", "plain", "none"], rare=True)
    all: bool = option("show every row and column of tables, not only the most important ones", False, rare=True)
    legend: bool = option("omit the lines that explain the columns of tables", True, "--no-legend", rare=True)


class OfBase(Watched, group="input"):
    """How a base is read."""

    base: str | Path = argument("directory of model or pipeline, file, hub name or address")
    io: IOMode = option("how to read tensors; use pread on network file systems", "mmap", choices=["mmap", "pread"], rare=True)
    remote: RemoteMode | None = option("how to read an input at an address. cache: download what is needed before starting; stream: read "
        "byte ranges and store nothing (if not given: cache for the hub, else stream)", choices=["cache", "stream"], rare=True)
    architecture: str | None = option("class of BASE in transformers, such as GPT2LMHeadModel; needed only if a message asks for it",
        metavar="NAME", bound=Bound("the name of a class", lambda name: isinstance(name, str)), rare=True)


class Ignoring(Options, group="input"):
    """Keys of an adapter's config that have no effect."""

    ignore_keys: Sequence[str] = option("ignore the unknown key KEY of the adapter's config (repeatable)", (), "--ignore-key",
        metavar="KEY", nargs="append", bound=KEYS, rare=True)


class OfAdapter(Ignoring, OfBase, group="input"):
    """How a base and an adapter are read, and facts that they do not contain."""

    base_is_residual: bool = option("BASE is the residual of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ, on which ADAPTER was trained", False,
        rare=True)
    lora_b_layout: LoraBLayout | None = option("order of lora_B's columns for stacked experts, if ADAPTER does not state it: rank_major "
        "(PEFT), or grouped_by_expert (Unsloth until September 2026)", choices=["rank_major", "grouped_by_expert"], rare=True)


class OnDevice(Options, group="computing"):
    """Where a run computes."""

    device: str = option("where to compute: cpu, cuda or cuda:i (cuda has not been run on a GPU yet); auto: run detection on a "
        "GPU if there is one, and models on the CPU", "auto", metavar="DEV", rare=True)


class Computing(OnDevice, group="computing"):
    """Where a run computes, and with how much memory."""

    max_memory: int | str | None = option(f"{MEMORY}. With a low limit, large matrices take longer, and directions that need a full SVD "
        "are left undecided; what does not fit is refused", metavar="SIZE", shown="no limit", detail=COUNTED, bound=BYTES)


class Threads(Options, group="computing"):
    """Threads of a command; in Python, torch's own."""

    threads: int | None = option("CPU threads", metavar="N", shown="OMP_NUM_THREADS, or one per core available to this process, "
        "CORES here",
        bound=whole(1, MOST_THREADS, "a number"), rare=True)


class Judged(Options, group="detection"):
    """What counts as an intruder; None means the value in the findings, or the default."""

    top_k: int | float | None = option("leading directions to examine in each matrix, as a count or as a share such as 0.1", metavar="K",
        shown="10, or as in the findings given", expects="a count like 10 or a share like 0.1", detail="A count is an int from 1, a share "
        "of min(rows, columns) a float in (0, 1].", rare=True)
    threshold_epsilon: float | None = option("a direction is an intruder if its similarity to the base is below E", None, "--epsilon",
        metavar="E", shown="0.5, or as in the findings given", detail="E is in (0, 1]; the similarity is the largest |cosine| to a left "
        "singular vector of the base.", rare=True)
    solver: str | None = option("Krylov with bounds (certified), LAPACK's full SVD (dense), or the cheaper one (auto)", choices=["auto",
        "certified", "dense"], shown="auto, or as in the findings given", rare=True)


class Writing(Options, group="output"):
    """What happens to an output that exists, whole or in part."""

    output: str | Path | None = written("", "PATH")
    resume: bool = option("start over instead of resuming an interrupted run", True, "--no-resume", rare=True)
    overwrite: bool = option("replace an existing output, or write into a directory with other files. Unrelated files are kept; the run is "
        "refused if one of them has a name that the output needs or a loader would read", False)


class DryRuns(Options, group="output"):
    """A command that can be tried."""

    dry_run: bool = option("check inputs and options, forecast memory, disk and time, and write nothing", False)


class WorkerOptions(Options, group="workers (docs/workers.md)"):
    """Workers of a command; Python's functions take an executor."""

    workers: int | None = option("compute in N processes that share the cores and --max-memory", metavar="N", shown="in this process",
        bound=whole(1, words="a number"), rare=True)
    executor: str | None = option("compute on the workers of a cluster: dask:HOST:PORT, dask:FILE.json (its scheduler file), ray:auto or "
        "ray:HOST:PORT; --threads and --max-memory apply to each task", metavar="ENGINE:ADDRESS", rare=True)


class DetectOptions(Writing, Judged, Computing, OfAdapter):
    """Options of `detect_intruder_dimensions`."""

    adapter: Adapters = argument(ADAPTERS, nargs="+")
    output: str | Path | None = written(f"findings file to write (.safetensors); {SEVERAL} NAME.safetensors per adapter", "FILE")
    executor: Executor | None = keyword("")


class Scaling(Options, group="mitigation"):
    """What methods need."""

    amplify: bool = option("allow a lambda outside [0, 1]: above 1 enlarges an intruder, below 0 changes its sign", False, rare=True)
    coefficients: Coefficients | str | Path | None = option("factors from `streamer repair`, for method regmean, which uses neither "
        "detection nor --lambda", metavar="FILE", rare=True)
    map: InputMap | str | Path | None = option("map of BASE from `streamer map`, for method nullspace, which uses no detection",
        metavar="FILE")
    select: Selection = option("scale all intruders among the top k, or only the highest-ranked one of each matrix", "all", "--select",
        "--scale", choices=["all", "first"], rare=True)

    def files(self) -> dict[str, Any]:
        """Return the coefficients and the map that are given, read from their files if paths are given."""
        from streamer.methods import files  # it loads torch

        loaders, read = {"coefficients": files.load_coefficients, "map": files.load_map}, files.Coefficients | files.InputMap
        values = {name: value for name in loaders if (value := getattr(self, name)) is not None}
        return {name: v if isinstance(v, read) else loaders[name](v) for name, v in values.items()}


class MethodOptions(Scaling, group="mitigation"):
    """A mitigation method."""

    mitigation_lambda: float | None = option("share of each intruder (project: of the adapter's part; shrink: of the adapter) to keep, "
        "from 0 (remove) to 1 (keep). With --map: share of each delta's energy on general inputs", None, "--lambda", metavar="L",
        shown=f"{DEFAULT.mitigation_lambda:g}, with a map {NullSpace.mitigation_lambda:g}")
    method: MethodName | None = option("; ".join(f"{name}: {METHODS[name].about}" for name in WITHOUT_FILES) + ". With --coefficients "
        "or --map, the file sets the method", metavar="NAME", choices=[*METHODS], shown=f"in Python {DEFAULT.name}",
        detail="The mitigated delta "
        "is Δ + (λ − 1) U Σ Vᵀ (paper), (I − (1 − λ) U Uᵀ) Δ (project), λ Δ (shrink) or L R'ᵀ with new right factors (regmean).")

    @cached_property
    def chosen(self) -> Method:
        """Make the method, and read its coefficients or its map.

        Raises
        ------
        UsageError
            If coefficients are combined with a λ or another method, or if λ is refused.
        """
        given = {f.name: value for f in fields(MethodOptions) if (value := getattr(self, f.name)) != f.default}
        given |= self.files()
        return make_method(given.pop("method", None), **given)


class Mitigation(MethodOptions, Judged, Computing, OfAdapter, group="mitigation"):
    """A mitigation method, and the findings that it may need."""

    findings: FindingsOrPath = option(f"{FINDINGS} (a directory for several adapters); without it, detection runs first if the "
        "method needs it", metavar="FILE")


class Dequantizing(Options):
    """A model in plain tensors."""

    dequantize: bool = option("if the base is quantized, write a plain model, in the dtype of its config", False)


class WritingOptions(Writing, Mitigation, group="output"):
    """What mitigate and merge share."""

    adapter: Adapters = argument(ADAPTERS, nargs="+")
    model_card: bool = option(CARD, True, "--no-card", rare=True)


class Serving(Options, group="output"):
    """An adapter that servers apply as PEFT does."""

    for_server: bool = option("for vLLM, SGLang and llama.cpp, which ignore some scales: one rank and scale 1 for all modules", False)


class MitigateOptions(Serving, WritingOptions):
    """Options of `reduce_intruder_dimension`."""

    output: str | Path = written(f"adapter directory to write; {SEVERAL} subdirectory NAME per adapter", "DIR")
    to_lora: int | float | None = option(f"write a LoRA adapter of this rank from any kind of adapter. {RANK_OR_SHARE}", metavar="RANK",
        bound=RANK, expects="a rank like 16 or a share like 0.95")


class MergeOptions(Dequantizing, WritingOptions):
    """Options of `merge_with_reduced_intruder_dimensions`."""

    output: str | Path = written(f"model directory to write; {SEVERAL} subdirectory NAME per adapter", "DIR")
    requantize: InputMap | str | Path | None = option("if the base is in 4 bits, write merged weights in its codes again; needs a map of "
        "BASE from `streamer map`", metavar="MAP", rare=True)
    dtype: MergedDtype | None = option("write plain floating-point tensors in this dtype, but not those stored wider than most",
        choices=["bf16", "fp16", "fp32"], metavar="DTYPE", shown="the base's", detail="bf16, fp16 or fp32.")
    max_shard_size: str | int | None = option("largest size of a file, like 5GB", metavar="SIZE",
        shown="the base's files", detail="GB is 1000³ bytes, as in transformers; GiB is 1024³.", bound=BYTES)
    executor: Executor | None = keyword("workers that write shards")


class IterateOptions(Dequantizing, Mitigation):
    """Options of `iter_merged`."""

    tensors: Callable[[str], bool] | None = keyword("function that tells from its name whether to make and yield a tensor",
        Bound("a function that takes a name", callable))


class Products(Computing, group="computing"):
    """Where and how a sweep multiplies."""

    device: str = option("where to run the model: cpu, cuda or cuda:i (cuda has not been run on a GPU yet); auto: the CPU", "auto",
        metavar="DEV", rare=True)
    max_memory: int | str | None = option(f"{MEMORY}. With a low limit, fewer sequences run together, and their states go to a temporary "
        "file; what does not fit is refused", metavar="SIZE", shown="no limit", detail=COUNTED, bound=BYTES, rare=True)
    dtype: ProductDtype = option("dtype of products with base weights; bf16 is faster on some processors", "float32",
        choices=["float32", "bf16"], rare=True)


class Reading(Products):
    """How much of texts a sweep reads."""

    sequences: int = option("maximum number of sequences per text", 32, metavar="N", bound=whole(2))
    length: int = option("maximum number of tokens per sequence", 128, metavar="N", bound=whole(2))


class Texts(Reading):
    """Two texts."""

    general: str | Path | None = option("general text, for measuring forgetting: .txt, .jsonl or .npy", metavar="TEXT",
        shown=f"{BUILT_IN_TITLE}; your own text works better")
    task: str | Path | None = option("text from ADAPTER's task but not from its training data", metavar="TEXT",
        shown="text that ADAPTER writes")
    prompts: str | Path | None = option("without --task: lines with which the text that ADAPTER writes begins, for adapters that answer: "
        ".txt, or .jsonl with prompt or messages", metavar="FILE", shown="the base's tokens between texts", rare=True)
    seed: int = option("without --task: decides what ADAPTER writes", 1, metavar="N", bound=whole(0), rare=True)


class VariantOptions(Scaling, Products, OfAdapter):
    """Variants of a model that are measured."""

    adapter: str | Path = argument(ONE_ADAPTER)
    findings: Findings | str | Path | None = option(f"{FINDINGS}; paper and project need them", metavar="FILE")
    lambdas: Sequence[float] = option("shares to keep, separated by commas", (0.75, 0.5), "--lambda", metavar="L,L")
    methods: Sequence[MethodName] | None = option(f"one or several of {', '.join(WITHOUT_FILES)}, separated by commas (default: shrink, "
        "and with --findings paper too); to evaluate only --coefficients, give their method, regmean", None, "--method",
        metavar="M,M")
    keep: float = option("share of the learning that the suggestion must keep", 0.9, metavar="SHARE", bound=SHARE, rare=True)
    projected: bool = option("evaluate deltas projected onto the adapter's rank, as `mitigate` writes them", False, rare=True)


class EvaluateOptions(Writing, Texts, VariantOptions):
    """Options of `evaluate_variants`."""

    output: str | Path | None = option("JSON file to write; new variants are added to an evaluation of the same inputs, texts and options",
        None, "-o", "--output", metavar="FILE", shown="print alone, and keep nothing")
    other: str | Path | Sequence[str | Path] = option("another text to measure; it does not affect the suggestion (repeatable)", (),
        metavar="TEXT", nargs="append", bound=PATHS)


class MappingOptions(Writing, Reading, OfBase):
    """Options of `map_inputs`."""

    output: str | Path | None = written("map file to write (.safetensors)", "FILE")
    base: str | Path = argument("model directory, hub name or address", nargs="+")
    general: str | Path | None = option("general text to run through BASE: .txt, .jsonl or .npy", metavar="TEXT", shown=BUILT_IN_TITLE)
    vectors: int = option("leading vectors to store for each input", 16, metavar="N", bound=whole(1), rare=True)


class RepairOptions(Serving, Writing, Texts, OfAdapter):
    """Options of `repair_adapter`."""

    adapter: str | Path = argument(ONE_ADAPTER)
    output: str | Path = written("directory to write: an adapter, or with --merge a model", "DIR")
    keep: float = option("least share of the learning to keep", 0.9, metavar="SHARE", bound=SHARE)
    weights: Sequence[float] = option("weights of the general text to fit and measure, rising", (0.5, 8.0), "--mu", metavar="M,M",
        bound=RISING, rare=True)
    sequences: int = option("maximum number of sequences per text, but twice as many of the built-in text", 24, metavar="N", bound=whole(4))
    length: int = option("maximum number of tokens per sequence", 64, metavar="N", bound=whole(2))
    holdout: float = option("share of each text's sequences to hold out for choosing and measuring", 0.33, metavar="SHARE", bound=PART,
        rare=True)
    seed: int = option("decides which sequences are held out, and without --task what ADAPTER writes", 0, metavar="N", bound=whole(0),
        rare=True)
    to_lora: int | float | None = option("first write ADAPTER, of any kind, as a LoRA adapter of this rank, beside DIR. " + RANK_OR_SHARE,
        metavar="RANK", bound=RANK, expects="a rank like 16 or a share like 0.95")
    merge: bool = option("write a model with the repaired adapter merged in", False)
    dequantize: bool = option("with --merge: if the base is quantized, write a plain model", False, rare=True)
    model_card: bool = option(CARD, True, "--no-card", rare=True)


class InspectOptions(OfAdapter):
    """Options of `streamer inspect`."""

    adapter: str | Path = argument(ONE_ADAPTER)


class ReportOptions(Options):
    """Options of `write_report`."""

    findings: Findings | Evaluation | str | Path = argument("findings file from `streamer detect`, an evaluation, or an output's "
        "directory")
    output: str | Path | None = option("page to write, a name that ends in .html", None, "-o", "--output", metavar="PAGE")
    overwrite: bool = option("replace an existing report; no other file is ever replaced", False)


class VerifyOptions(Watched):
    """Options of `verify_output`."""

    output: str | Path = argument("directory of one merged model or mitigated adapter")
    base: str | Path | None = argument("base of OUTPUT: also recompute a sample of matrices", None, nargs="?")
    adapter: str | Path | None = argument("the adapter; give it together with BASE", None, nargs="?")
    sample: int | Literal["all"] = option("number of matrices to recompute, spread over their kinds; all: recompute every matrix and "
        "compare every other tensor byte by byte", 3, metavar="N",
        bound=Bound("a count from 1 or 'all'", lambda n: n == "all" or whole(1).holds(n)))
    coefficients: str | Path | None = option("file of the fit that OUTPUT was made with", metavar="FILE", shown=BESIDE)
    map: str | Path | None = option("map that OUTPUT was made with", metavar="FILE", shown=BESIDE)


class DemoOptions(Options):
    """Options of `streamer demo`."""

    output: str | Path | None = option("keep all files in DIR, which must not exist", None, "-o", "--output", metavar="DIR",
        shown="keep nothing")


class LiveOptions(Judged, OnDevice, Ignoring, Watched):
    """Options of functions on a model in memory."""


class LiveMitigation(MethodOptions, LiveOptions):
    """Options of functions that mitigate a model in memory."""

    findings: Findings | str | Path | None = keyword("")
# fmt: on
