"""Define and explain, once, the keywords that several functions of the library share.

Each function lists its own keywords, and the keywords of PEFT's function. It accepts the others as ``**options``, typed by one of the
classes here; `explained` adds them to its signature and docstring. Nothing here imports torch, because verification does not need it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from streamer.api.choices import REMOVED
from streamer.api.progress import monitoring
from streamer.errors import UsageError
from streamer.events import Monitor, OnEvent
from streamer.units import parse_size

if TYPE_CHECKING:
    from streamer.adapters.adapter_config import LoraBLayout
    from streamer.detection.findings import Findings
    from streamer.evaluation.losses import ProductDtype
    from streamer.json_types import Selection
    from streamer.methods import MethodName
    from streamer.methods.files import Coefficients, InputMap
    from streamer.output.write import FindingsOrPath
    from streamer.remote.inputs import RemoteMode
    from streamer.storage.tensor_file import IOMode


class WatchKeywords(TypedDict, total=False):
    """Keywords for watching a call.

    on_event
        Function to call with an `Event` at each step and for each warning. Without it and `monitor`, warnings are `StreamerWarning`.
    monitor
        A `Monitor` instead of `on_event`, for callers that also need to stop a run at its next safe point.
    progress
        True draws tqdm bars. None draws them only in a notebook, and only without `on_event` and `monitor`.
    """

    on_event: OnEvent | None
    monitor: Monitor | None
    progress: bool | None


class ReadKeywords(WatchKeywords, total=False):
    """Keywords for reading inputs, and for facts that the inputs do not contain.

    io
        How to read tensors: ``mmap``, or ``pread`` for network file systems, which needs memory for a copy of each matrix.
    base_is_residual
        True if `base` is the residual model of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ; without it, their adapters are refused.
    lora_b_layout
        Order of ``lora_B``'s columns for stacked experts, if not in the config: ``rank_major`` (PEFT), ``grouped_by_expert`` (old Unsloth).
    ignore_keys
        Unknown keys of ``adapter_config.json`` to accept because you know that they have no effect; other unknown keys are refused.
    architecture
        Class of the base in transformers, like ``"GPT2LMHeadModel"``, if its ``config.json`` is missing or names an unknown class.
    remote
        How to read inputs at addresses: ``cache`` downloads first, ``stream`` reads ranges; None: ``cache`` for the hub, else ``stream``.
    """

    io: IOMode
    base_is_residual: bool
    lora_b_layout: LoraBLayout | None
    ignore_keys: Sequence[str]
    architecture: str | None
    remote: RemoteMode | None


class RunKeywords(ReadKeywords, total=False):
    """Keywords of functions that write outputs.

    resume
        Whether to continue an interrupted run with the same inputs and options; False starts over.
    overwrite
        Whether to replace an output or an interrupted run of other inputs or options, or to write into a directory with other files.
        Files that do not belong to an output are never replaced.
    """

    resume: bool
    overwrite: bool


class JudgeKeywords(ReadKeywords, total=False):
    """Keywords that define intruders and choose how detection computes.

    top_k
        Number of leading singular directions to judge in each matrix: an int from 1, or a float in (0, 1], a share of min(rows, columns).
        None: as in the given findings, else 10.
    threshold_epsilon
        Threshold in (0, 1]: a direction is an intruder if its similarity, its largest |cosine| to a left singular vector of the base, is
        smaller. None: as in the given findings, else 0.5.
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver if the bounds do not settle a decision; ``dense``: LAPACK's
        full SVD; ``auto``: the cheaper one for each matrix. None: as in the given findings, else ``auto``.
    max_memory
        Budget in bytes, or as a size like ``"4G"`` (powers of 1024), for the anonymous memory of Python, torch and streamer, without your
        program's data; 200M (350M with torch for GPUs) are needed before any matrix. With a budget, large matrices are multiplied as
        stored, and directions that only a full SVD could settle stay open. A budget that is too small is refused. None uses what is needed.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA if a GPU is available.
    """

    top_k: int | float | None
    threshold_epsilon: float | None
    solver: str | None
    max_memory: int | str | None
    device: str


class DetectKeywords(JudgeKeywords, RunKeywords, total=False):
    """Keywords of `streamer.detect_intruder_dimensions`."""

    executor: Executor | None


class MethodKeywords(TypedDict, total=False):
    """Keywords that choose a mitigation method.

    method
        With detection, ``paper`` scales each intruder's whole direction, ``Δ' = Δ + (λ − 1) U Σ Vᵀ``, and ``project`` only the adapter's
        part of it, ``Δ' = (I − (1 − λ) U Uᵀ) Δ``. Without detection, ``shrink`` scales the whole adapter, ``Δ' = λ Δ``; ``regmean``
        uses new right factors, ``Δ' = L R'ᵀ``; ``nullspace`` reduces the response of Δ to general inputs. None is the method of the given
        coefficients or map, else ``paper``.
    select
        Which intruders to scale: ``all`` among the top k, or only the ``first`` (highest-ranked) of each matrix; formerly `scale`.
    coefficients
        Factors from `fit_coefficients` for this base and adapter, or the path of their file, for ``regmean``.
    keep
        Share of the learning that chooses a set, if there are several sets of coefficients.
    amplify
        Whether to allow λ outside [0, 1]: above 1 an intruder grows, below 0 its sign changes.
    map
        Map of the base from `map_inputs`, or the path of its file; λ is then a share of each delta's energy on general inputs.
    """

    method: MethodName | None
    select: Selection
    coefficients: Coefficients | str | Path | None
    keep: float | None
    amplify: bool
    map: InputMap | str | Path | None


class MitigateKeywords(MethodKeywords, JudgeKeywords, total=False):
    """Keywords of functions that mitigate files, and run detection first unless findings are given.

    mitigation_lambda
        Share of an intruder (project: of the adapter's part) to keep. None is 0.75, or 0.6 with a `map`; `coefficients` need no λ.
    """

    mitigation_lambda: float | None
    findings: FindingsOrPath


class IterateKeywords(MitigateKeywords, total=False):
    """Keywords of `streamer.iter_merged`."""

    dequantize: bool


class ReduceKeywords(MitigateKeywords, RunKeywords, total=False):
    """Keywords of `streamer.reduce_intruder_dimension`.

    model_card
        Whether to describe in ``README.md`` how the output was made, with base and tags in its header; False leaves it unchanged.
    """

    to_lora: int | float | None
    model_card: bool


class MergeKeywords(IterateKeywords, RunKeywords, total=False):
    """Keywords of `streamer.merge_with_reduced_intruder_dimensions`."""

    model_card: bool
    executor: Executor | None


class TextKeywords(RunKeywords, total=False):
    """Keywords of functions that run the base on texts."""

    sequences: int
    length: int
    dtype: ProductDtype
    max_memory: int | str | None
    device: str


class EvaluateKeywords(JudgeKeywords, TextKeywords, total=False):
    """Keywords of `streamer.evaluate_variants`."""

    other: str | Path | Sequence[str | Path]
    findings: Findings | str | Path | None
    methods: Sequence[MethodName]
    lambdas: Sequence[float]
    amplify: bool
    select: Selection
    coefficients: Coefficients | str | Path | None
    map: InputMap | str | Path | None
    keep: float
    projected: bool


class FitKeywords(TextKeywords, total=False):
    """Keywords of `streamer.fit_coefficients`."""

    keep: float | Sequence[float]
    weights: Sequence[float]
    holdout: float
    seed: int


class MapKeywords(TextKeywords, total=False):
    """Keywords of `streamer.map_inputs`."""

    vectors: int


class RepairKeywords(FitKeywords, total=False):
    """Keywords of `streamer.repair_adapter`."""

    general: str | Path | None
    findings: Findings | str | Path | None
    merge: bool
    dequantize: bool
    to_lora: int | float | None
    model_card: bool


class LiveDetectKeywords(TypedDict, total=False):
    """Keywords of `streamer.peft.detect_intruder_dimensions`."""

    solver: str | None
    device: str
    ignore_keys: Sequence[str]
    on_event: OnEvent | None
    progress: bool | None


class LiveKeywords(MethodKeywords, LiveDetectKeywords, total=False):
    """Keywords of functions that mitigate a model in memory."""

    findings: Findings | str | Path | None


class _Named(TypedDict, total=False):
    """Keywords that functions list themselves.

    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; one ``.safetensors`` file; or a pipeline.
    adapter
        Directory of a PEFT adapter, a pipeline's or a fully fine-tuned model; or a list or tuple of these, or of directories of adapters.
    peft_model
        A `PeftModel`, or a model with injected adapters (PEFT's ``inject_adapter_in_model``, which transformers' ``add_adapter`` calls).
    """


def watched(keywords: WatchKeywords | LiveDetectKeywords) -> AbstractContextManager[Monitor]:
    """Make the monitor of a call from its keywords."""
    given = cast(Mapping[str, Any], keywords)
    return monitoring(given.get("on_event"), given.get("monitor"), given.get("progress"))


Function = TypeVar("Function", bound=Callable[..., Any])

_CLASSES = (
    WatchKeywords, ReadKeywords, RunKeywords, JudgeKeywords, MethodKeywords, MitigateKeywords, ReduceKeywords, _Named,
)  # fmt: skip
_TEXTS = {
    name: text
    for kind in _CLASSES
    for name, text in re.findall(r"^(\w+)\n((?:    .*\n?)+)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE)
}


def explained(keywords: type, *options: Any) -> Callable[[Function], Function]:
    """Add the keywords that a function accepts as ``**options`` to its signature and docstring; make it refuse others.

    The function's own parameters are explained too if its docstring leaves them out.

    Parameters
    ----------
    keywords
        Type of ``**options``.
    options
        Dataclasses whose fields have the keywords' defaults; other keywords default to None.
    """
    defaults = {f.name: f.default for kind in options for f in fields(kind)}

    def complete(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in keywords.__annotations__.items()
        ]
        names = [p.name for p in (*own, *more)]

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            if "scale" in given and "select" in names and "select" not in given:
                given["select"] = given.pop("scale")  # its name before 0.2
            for name in given.keys() - set(names):
                option, command = f"--{name.replace('_', '-')}", function.__name__.partition("_")[0]
                if advice := REMOVED.get(option) or REMOVED.get(f"{command} {option}"):
                    raise TypeError(f"{function.__name__}(): {name} was removed: {advice}")
                meant = "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, names, 1))
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{meant}")
            return function(*args, **given)

        head, mark, rest = inspect.cleandoc(function.__doc__ or "").partition("Parameters\n----------\n")
        at = re.search(r"^\S+\n-+\n", rest, re.MULTILINE)
        said, tail = (rest[: at.start()], rest[at.start() :]) if at else (rest, "")
        stated = re.findall(r"^(\w[\w, ]*)\n((?:    .*\n?|\n(?=    ))+)", said, re.MULTILINE)
        texts = {name: f"{name}\n{text}" for name, text in _TEXTS.items()}
        texts |= {name: f"{line}\n{text}" for line, text in stated for name in line.split(", ")}
        paragraphs = dict.fromkeys(texts[name].rstrip() for name in names if head)  # one for several; -OO has none
        checked.__doc__ = "\n".join([f"{head}{mark}".rstrip(), *paragraphs, "", tail])
        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]  # where inspect.signature looks for it
        return cast(Function, checked)

    return complete


def read_size(max_memory: object) -> int | None:
    """Convert a budget, in bytes or as a size like ``4G``, to bytes."""
    if isinstance(max_memory, str):
        try:
            return parse_size(max_memory)
        except ValueError as e:
            raise UsageError(f"max_memory: {e}") from None
    if max_memory is not None and (isinstance(max_memory, bool) or not isinstance(max_memory, int)):
        raise UsageError(f"max_memory: expected a whole number of bytes, found {max_memory!r}")
    return max_memory
