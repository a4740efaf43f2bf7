"""Findings, the result of detection for each matrix, with what determined it: their file, their summary, and the models that they fit.

On disk they are one safetensors file. For the base tensor ``T`` it holds the intruders' triplets ``T/U`` (m, q), ``T/S`` (q,) and
``T/Vh`` (q, n); ``T/singular_values``, ``T/similarity``, ``T/similarity_low``, ``T/similarity_high``, ``T/base_singular_values`` (k,)
float64; and ``T/intruders`` (q,) int64. The metadata's ``findings`` is JSON: identities, options, and the figures of each matrix. While
detection runs, a journal beside the file holds a record for each matrix; a record is itself a safetensors file of the matrix's tensors,
and the end of the run combines them.

On a base other than the adapter's, its directions look like random vectors, which is how such findings are recognised. Let u be a random
unit vector of R^m, and u⁰_1 … u⁰_p orthonormal. Each ⟨u, u⁰_i⟩² has the distribution Beta(1/2, (m − 1)/2). By the union bound,
max_i |⟨u, u⁰_i⟩|, which is near √(2 ln p / m), is at most `random_overlap` with a probability of at least 1 − `ALPHA`. After training,
most directions of a delta are closer than that to some singular vector of its own base.

The same model may be in files and in memory, its tensors under other names, in shards or on devices, and in a wider dtype than stored.
Findings for one apply to the other if every matrix has the same fingerprint.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NotRequired,
    TypedDict,
    cast,
    get_type_hints,
    overload,
)

import torch
from scipy.special import betaincinv
from torch import Tensor

from streamer import errors, json_types
from streamer.adapters.modules import LoraModule, values_of
from streamer.detection.intruders import Detection
from streamer.detection.options import (
    STAMP,
    DetectionOptions,
    OptionsRecord,
    detection_record,
    stamp,
)
from streamer.errors import printable
from streamer.json_types import (
    Amount,
    Count,
    Encoding,
    ModuleName,
    OutputPath,
    Rank,
    Scale,
    Shape,
    State,
    TensorName,
)
from streamer.linalg.operators import all_finite
from streamer.plan.plan import Plan
from streamer.plan.side_files import AdapterSource, BaseSource, NameSource, in_short
from streamer.plan.targets import Target
from streamer.storage.atomic_file import ShardPlan, plan_shard, remove_partials, write_sealed
from streamer.storage.checkpoint import TensorFile
from streamer.storage.files import (
    AdapterIdentity,
    BaseIdentity,
    check_identities,
    difference,
    locked,
)
from streamer.storage.header import DIGEST, NO_DIGEST
from streamer.storage.transaction import (
    check_file_path,
    check_replaced,
    check_space,
    journal_of,
    lock_of,
)
from streamer.tables import Column, Screen, table
from streamer.units import counted, format_size, listed
from streamer.weights.base import TORCH_DTYPES, StoredTensor, Weight, as_bytes, as_tensor

TRIPLET_PARTS = ("U", "S", "Vh")
NUMBERS = (
    "singular_values",
    "similarity",
    "similarity_low",
    "similarity_high",
    "base_singular_values",
)
ARRAYS = (*TRIPLET_PARTS, *NUMBERS, "intruders")
"""The arrays of a matrix, in file order."""


@dataclass(frozen=True, repr=False)
class MatrixFinding:
    """Finding for one matrix.

    Attributes
    ----------
    tensor, module
        Its name in the base and in the adapter.
    shape
        (out, in), independent of the order on disk.
    dtype
        The base tensor's dtype, spelled as in the safetensors format.
    rank, scale
        The adapter's rank and scale for this module.
    detection
        Decisions and factors. From a file, the factors are read through a memory map when they are used.
    seconds
        Time that detection took; None if read from a file, which stores no times.
    transposed
        Whether the base stores (in, out), as embeddings and Conv1D layers do; the output side is still judged.
    fingerprint
        Digest of the values behind the decisions (see `fingerprint`); None for a fine-tuned model.
    """

    # fmt: off
    tensor: TensorName
    module: ModuleName
    shape: Shape
    dtype: Encoding
    rank: Rank
    scale: Scale
    transposed: Annotated[bool, "Whether it is stored as (inputs, outputs), like embeddings. Decisions still use the output side."]
    fingerprint: Annotated[str | None, "SHA-256 of a sample of the base's values and the adapter's; null for a fine-tuned model."]
    detection: Detection
    seconds: Annotated[Amount | None, "Wall time in s of detection; null if the findings come from a file."] = \
        field(default=None, compare=False)
    # fmt: on

    def __repr__(self) -> str:
        return f"<MatrixFinding {self.tensor} {'x'.join(map(str, self.shape))}: {self.detection.summary()}>"

    def figures(self) -> dict[str, Any]:
        """Return everything except arrays and seconds, as JSON values."""
        return {key: value for key, value in self.record().items() if key in FIGURES}

    def record(self) -> dict[str, Any]:
        """Return everything except the vectors, as JSON values: a matrix in `streamer report --json`."""
        matrix, decisions = (
            {f.name: getattr(part, f.name) for f in fields(part)} for part in (self, self.detection)
        )
        seconds = matrix.pop("seconds")
        tree = {**matrix, **decisions, "seconds": seconds}
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in tree.items()
            if k not in (*TRIPLET_PARTS, "detection")
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by their names in a file, in its order: ``q.weight/U``, ``q.weight/S`` and so on."""
        d = self.detection
        dtypes = {"intruders": torch.int64} | dict.fromkeys(NUMBERS, torch.float64)
        values = {key: getattr(d, key) for key in ARRAYS}
        tensors = {
            key: torch.tensor(v, dtype=dtypes[key]) if key in dtypes else v
            for key, v in values.items()
        }
        return {f"{self.tensor}/{key}": t for key, t in tensors.items()}


FINDINGS_SCHEMA: Final = "streamer.findings/1"

FILE_NAME = "findings.safetensors"
"""Example of a findings file's name."""

COEFFICIENTS = "streamer.coefficients"
"""Metadata key of coefficients files, used to recognise one that was passed instead of findings."""

DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

_HINTS = get_type_hints(MatrixFinding, include_extras=True) | get_type_hints(
    Detection, include_extras=True
)

FIGURES = {
    key: hint for key, hint in _HINTS.items() if key not in (*ARRAYS, "detection", "seconds")
}
"""The figures of a matrix in the metadata, with their types."""

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""


def header_entries(arrays: Mapping[str, Tensor]) -> list[Entry]:
    """List the entries of arrays."""
    return [(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in arrays.items()]


ANOTHER_BASE = (
    "this looks like another base: in most matrices the leading direction is no closer to it than a random vector; check that the adapter "
    "was trained on this base (one that was trained at far too high a rate can look the same)"
)

ALPHA = 0.01
"""Largest share of random vectors that are closer to the base than `random_overlap`."""

# Share of matrices that look random, for adapters that PEFT trained on a Llama of width 128 and 288, and on MiniLM:
#   their own base, or that trained further      0.00 … 0.25
#   their own base, at a rate that destroys it   0.54
#   the base of another seed                     0.88 … 1.00   with three to six intruders per matrix
#   the base of another seed                     0.36 … 0.57   with two or three: it is not recognised
# A planted direction is random on any base: adapters with one per matrix score 0, because a matrix needs two intruders.
RANDOM_SHARE = 2 / 3
"""Least share of matrices that look random for findings to look like another base's."""

LEAST_MATRICES = 8
"""Least number of matrices that can be judged: a few may look random by chance."""

RANDOM_OVERLAP = 0.7
"""Matrices whose random overlap is above this share of epsilon show nothing: in few dimensions any intruder looks random."""


def random_overlap(shape: tuple[int, int]) -> float:
    """Bound the largest overlap of a random unit vector with the left singular vectors of an (m, n) matrix; see `ALPHA`.

    >>> round(random_overlap((4096, 4096)), 3), round((2 * math.log(4096) / 4096) ** 0.5, 3)
    (0.074, 0.064)
    """
    m = shape[0]
    p = min(shape)
    return math.sqrt(betaincinv(0.5, (m - 1) / 2, 1 - ALPHA / p)) if m > 1 else 1.0


def look_random(matrices: Sequence[MatrixFinding], epsilon: float) -> bool | None:
    """Test whether the leading directions of most matrices are intruders no closer to the base than random vectors; None if too few."""
    overlaps = [(m.detection, random_overlap(m.shape)) for m in matrices]
    judged = [(d, overlap) for d, overlap in overlaps if overlap <= RANDOM_OVERLAP * epsilon]
    # One of several intruders, and not proven closer to the base than a random vector.
    random = [
        d
        for d, most in judged
        if len(d.intruders) >= 2 and d.intruders[0] == 0 and d.similarity_low[0] <= most
    ]
    return len(random) >= RANDOM_SHARE * len(judged) if len(judged) >= LEAST_MATRICES else None


def summary_lines(tree: FindingsRecord) -> list[str]:
    """Summarise in three lines the result, the options and the inputs."""
    t = tree["totals"]
    o = tree["options"]
    matrices = tree["matrices"]
    with_any = sum(bool(m["intruders"]) for m in matrices)
    files = tree["base"].get("files", [])
    size = format_size(sum(f["bytes"] for f in files))
    base = f"{listed((f['file'] for f in files), 1)} ({size})" if files else "unknown"
    trained_on = tree["adapter"].get("base_model_name_or_path")
    names = " … ".join(dict.fromkeys(m["tensor"] for m in (*matrices[:1], *matrices[-1:])))
    lines = [
        f"{counted(t['intruders'], 'intruder')} in {with_any} of {counted(len(matrices), 'matrix')}, {t['certified']} certified; "
        f"top_k={o['top_k']}, threshold_epsilon={o['threshold_epsilon']}, solver={o['solver']}",
        f"base {base}" + (f", adapter trained on {trained_on!r}" if trained_on else ""),
        names or "no matrices",
    ]
    return [printable(line) for line in lines]


def _decided(m: MatrixFinding) -> str:
    d = m.detection
    again = ["float64"] if d.precision == "float64" and m.dtype != "F64" else []
    return ", ".join([d.solver, *again, *([] if d.certified else ["open"])])


def _ranks(ranks: Sequence[int]) -> str:
    """Format 0-based ranks as 1-based; runs of more than two are abbreviated."""
    # In a run, each rank exceeds its place by the same number.
    groups = itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])
    runs = [[j for _, j in group] for _, group in groups]
    ends = ((run[0], run[-1]) for run in runs)
    parts = []
    for a, b in ends:
        dash = " " if b == a + 1 else "-"
        parts.append(f"{a + 1}" if a == b else f"{a + 1}{dash}{b + 1}")
    return " ".join(parts) or "-"


# fmt: off
class TotalsRecord(TypedDict):
    """Totals over all matrices."""
    matrices: Annotated[Count, "Number of matrices."]
    intruders: Annotated[Count, "Intruders in all matrices."]
    certified: Annotated[Count, "Matrices with certified decisions only."]
    escalated: Annotated[Count, "Matrices that the certified solver could not decide, so the dense solver did."]
    degenerate: Annotated[Count, "Matrices with directions in so tight a cluster that no single vector is defined."]
    looks_like_another_base: Annotated[bool | None, "Whether the adapter was probably trained on another base: in most matrices the "
        "leading direction is one of several intruders, no closer to the base than a random vector. Null with fewer than 8 large matrices."]
    seconds: Annotated[Amount | None, "Wall time in s of detection, for the matrices that this run computed; null if there are none."]

class FindingsRecord(TypedDict):
    """The intruder dimensions of an adapter, as printed by `streamer detect --json` and `streamer report --json`."""
    schema: Literal["streamer.findings/1"]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model used as one, described in the same way."]
    options: Annotated[OptionsRecord, "Options that determined the findings."]
    totals: Annotated[TotalsRecord, "Totals over all matrices."]
    matrices: Annotated[list[dict[str, Any]], MatrixFinding, "One entry per matrix, in the base's file order."]
    output: NotRequired[Annotated[OutputPath, "Only for detect."]]
    state: NotRequired[Annotated[State, "Only for detect."]]


@dataclass(frozen=True, repr=False)
class Findings:
    """Results for all matrices of an adapter, in the base's file order: a sequence of `MatrixFinding`.

    ``findings[0]`` is one matrix; ``findings[:4]`` are findings for the first four; ``findings["layers.0.self_attn.q_proj"]`` is the matrix
    of that name; and ``findings["*.q_proj"]`` are findings for all that match. See `find` and `select`.

    Attributes
    ----------
    base, adapter
        Identities of the inputs (sizes, digests), without paths, so that the same inputs give the same bytes anywhere.
    options
        The options that determined the findings.
    matrices
        One entry for each matrix.
    sources
        Names of ``base`` and ``adapter``, and ids if known; they do not affect whether findings fit other inputs.
    """

    base: BaseIdentity
    adapter: AdapterIdentity
    options: DetectionOptions
    matrices: tuple[MatrixFinding, ...]
    _file: TensorFile | None = field(default=None, repr=False, compare=False)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """Omit the file when pickling for another process: all factors are pickled by value."""
        return {**self.__dict__, "_file": None}

    @classmethod
    def of(cls, plan: Plan, options: DetectionOptions, matrices: Iterable[MatrixFinding] = ()) -> Findings:
        """Make findings on a plan; without matrices they are only what a file states beside them."""
        sources = {what: in_short(source) for what, source in zip(("base", "adapter"), plan.sources, strict=True)}
        return cls(plan.base_identity, plan.adapter_identity, options, tuple(matrices), sources=sources)

    @cached_property
    def by_tensor(self) -> dict[str, MatrixFinding]:
        """Return the entries by the base tensor's name."""
        return {m.tensor: m for m in self.matrices}

    @property
    def name(self) -> str:
        """Return the name for messages: the file's path if they come from a file."""
        return str(self._file.path) if self._file else "findings"

    @property
    def intruders(self) -> int:
        """Count the intruders in all matrices."""
        return sum(len(m.detection.intruders) for m in self.matrices)

    @property
    def totals(self) -> TotalsRecord:
        """Return the totals over all matrices, as in `record`."""
        detections = [m.detection for m in self.matrices]
        timed = [m.seconds for m in self.matrices if m.seconds is not None]
        return {"matrices": len(detections), "intruders": self.intruders, "certified": sum(d.certified for d in detections),
                "escalated": sum(d.escalated for d in detections), "degenerate": sum(bool(d.degenerate) for d in detections),
                "looks_like_another_base": look_random(self.matrices, self.options.threshold_epsilon),
                "seconds": sum(timed) if timed else None}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warn if the base does not look like the base on which the adapter was trained."""
        return (ANOTHER_BASE,) if self.totals["looks_like_another_base"] else ()

    def digest(self) -> str:
        """Hash (SHA-256, hex) the decisions and factors of all matrices, which determine what they do to a delta, to the last bit.

        The last bits depend on the number of threads; `decisions_digest` does not.
        """
        digest = hashlib.sha256()
        for m in self.matrices:
            digest.update(f"{m.tensor}{m.detection.intruders}{m.detection.certified}".encode())
            for factor in (m.detection.U, m.detection.S, m.detection.Vh):
                digest.update(as_bytes(factor))
        return digest.hexdigest()

    def decisions_digest(self) -> str:
        """Hash (SHA-256, hex) the inputs and options, and the intruders of each matrix."""
        decisions = [list(m.detection.intruders) for m in self.matrices]
        return hashlib.sha256(json.dumps([self.made_from(), decisions]).encode()).hexdigest()

    def made_from(self, tensors: Iterable[str] | None = None) -> str:
        """Hash (SHA-256, hex) everything that determines the findings' bytes, or those of findings for other tensors, in file order."""
        names = [m.tensor for m in self.matrices] if tensors is None else list(tensors)
        inputs = {"base": self.base, "adapter": self.adapter, "options": self.options.as_dict()}
        plan = {"schema": FINDINGS_SCHEMA, **inputs, "tensors": names}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def file_plan(self, name: str, matrices: Sequence[Mapping[str, Any]], arrays: Sequence[Entry]) -> ShardPlan:
        """Lay out a file, which gets the same bytes whether it is written directly or through a journal.

        Parameters
        ----------
        name
            The file's name.
        matrices
            The figures of each matrix.
        arrays
            The entries of all arrays.
        """
        tree = {"base": self.base, "adapter": self.adapter, "options": self.options.as_dict(), "matrices": matrices}
        metadata = {"schema": FINDINGS_SCHEMA, "findings": json.dumps(tree), DIGEST: NO_DIGEST}
        if self.sources:
            detection = detection_record(self.options, sum(m["certified"] is True for m in matrices), len(matrices))
            base, adapter = (cast(NameSource, self.sources[what]) for what in ("base", "adapter"))
            metadata[STAMP] = stamp("detect", base, adapter, detection)
        return plan_shard(name, arrays, metadata)

    def check_matches(self, base: BaseIdentity, adapter: AdapterIdentity, options: DetectionOptions | None) -> None:
        """Refuse findings that were made with another base, adapter or options.

        Parameters
        ----------
        base, adapter
            Identities of the inputs with which they are to be used.
        options
            The requested options; None accepts the findings' own.

        Raises
        ------
        MismatchError
            Names the one that differs, and how.
        """
        for what, recorded, current in ("base", {**self.base}, {**base}), ("adapter", {**self.adapter}, {**adapter}):
            if recorded != current:
                other = f"made with another {what} ({difference(recorded, current)})"
                raise errors.MismatchError(f"{self.name}: {other}; run detect again on this one")
        for name, value in (asdict(options) if options else {}).items():
            recorded_value = getattr(self.options, name)
            # The solver and its memory do not matter to users of findings, unless they requested a solver.
            if value != recorded_value and not ((name == "solver" and value == "auto") or name == "max_memory"):
                other = f"made with {name}={recorded_value!r}, asked for {value!r}"
                raise errors.MismatchError(f"{self.name}: {other}; pass the same, or run detect again")

    def find(self, name: str) -> MatrixFinding:
        """Find one matrix by name.

        Parameters
        ----------
        name
            A base tensor's name, an adapter module's name, or the end of one, starting after a dot, that no other matrix shares:
            ``layers.0.self_attn.q_proj``.

        Raises
        ------
        UnknownNameError
            If no matrix or several have it; this is a `KeyError`.
        """
        ends = [m for m in self if any(full_name.endswith(f".{name}") for full_name in (m.tensor, m.module))]
        for fits in ([m for m in self if name in (m.tensor, m.module)], ends):
            if len(fits) == 1:
                return fits[0]
            if fits:
                what = f"{name!r} fits {len(fits)} matrices: {listed(m.tensor for m in fits)}"
                raise errors.UnknownNameError(f"findings: {what}; use a longer name, or '*{name}*' for all")
        close = difflib.get_close_matches(name, [full_name for m in self for full_name in (m.tensor, m.module)], 1, 0.5)
        near = f"did you mean {close[0]!r}?" if close else f"there are {listed((m.tensor for m in self), 2)}"
        raise errors.UnknownNameError(f"findings: no matrix is called {name!r}; {near}")

    def select(self, pattern: str) -> Findings:
        """Select the findings for the matrices whose tensor or module matches a pattern; mitigate and merge need findings for all matrices.

        Parameters
        ----------
        pattern
            A name with ``*``, ``?`` or ``[…]``, as in file names: ``*.layers.[0-3].*.q_proj``.

        Raises
        ------
        UnknownNameError
            If no matrix matches; this is a `KeyError`.
        """
        literal = re.sub(r"\[(\d+)\]", r"[[]\1]", pattern)  # expert numbers have this form
        fits = [re.compile(fnmatch.translate(p)).match for p in dict.fromkeys((pattern, literal))]
        matrices = tuple(m for m in self if any(fit(name) for fit in fits for name in (m.tensor, m.module)))
        if not matrices:
            names = listed((m.tensor for m in self), 2)
            raise errors.UnknownNameError(f"findings: no matrix fits {pattern!r}; there are {names}")
        return replace(self, matrices=matrices)

    @overload
    def __getitem__(self, key: int) -> MatrixFinding: ...
    @overload
    def __getitem__(self, key: slice) -> Findings: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...  # `find` or `select`
    def __getitem__(self, key: int | slice | str) -> MatrixFinding | Findings:
        if isinstance(key, slice):
            return replace(self, matrices=self.matrices[key])
        if not isinstance(key, str):
            return self.matrices[key]
        is_pattern = re.search(r"[*?]|\[(?!\d+\])", key)  # ``[3]`` alone is an expert's number
        return self.select(key) if is_pattern else self.find(key)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return any(key is m for m in self.matrices)
        with contextlib.suppress(errors.UnknownNameError):
            self.find(key)
            return True
        return False

    def __iter__(self) -> Iterator[MatrixFinding]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def record(self) -> FindingsRecord:
        """Return everything except the vectors, as JSON values: the output of `streamer report --json`.

        Names may be added but never change. Seconds are None if the findings were read from a file.
        """
        return {
            "schema": FINDINGS_SCHEMA,
            "base": cast(BaseSource, {**self.sources.get("base", {}), **self.base}),
            "adapter": cast(AdapterSource, {**self.sources.get("adapter", {}), **self.adapter}),
            "options": self.options.as_dict(),
            "totals": self.totals,
            "matrices": [m.record() for m in self.matrices],
        }

    def columns(self, chosen: Sequence[MatrixFinding]) -> list[Column]:
        """Make the columns of a table of some matrices."""
        detections = [m.detection for m in chosen]
        epsilon = self.options.threshold_epsilon
        columns = [
            Column("matrix", [m.tensor for m in chosen], left=True, names=True, among=[m.tensor for m in self]),
            Column("shape", ["x".join(map(str, m.shape)) for m in chosen], "rows x columns", 1),
            Column("r", [str(m.rank or "-") for m in chosen], "rank of the adapter's factors", 2),
            Column("intruders", [str(len(d.intruders)) for d in detections], "leading directions that resemble none of the base's", 9),
            Column("ranks", [_ranks(d.intruders) for d in detections], "ranks of the intruders in base + adapter; 1 is the largest", 6),
            Column("similarity", [f"{min(d.similarity):.3f}" for d in detections],
                   f"lowest of a direction to the base, from 0 to 1; below {epsilon:g} is an intruder", 4),
            Column("sigma", [f"{d.singular_values[0]:#.4g}" for d in detections], "largest singular value of base + adapter", 0),
            Column("|delta|", [f"{d.delta_norm:#.4g}" for d in detections], "Frobenius norm of the delta", 3),
            Column("energy", [f"{100 * d.intruder_energy:.1f}%" for d in detections], "the intruders' share of |delta|^2", 8),
            Column("lost", [f"{100 * d.dropped_at_zero:.1f}%" for d in detections],
                   "share lost in projection onto rank r by `mitigate --lambda 0 --method paper`", 5),
        ]
        if len({_decided(m) for m in self}) > 1:
            about = "the solver; float64 if float32 left a direction open; open if nothing settled it"
            columns.append(Column("decided", [_decided(m) for m in chosen], about, 7))
        return columns

    def table(self) -> str:
        """Format a text table with a line for each matrix, and the totals."""
        return "\n".join([table(self.columns(self.matrices), Screen(legend=False)), "", *summary_lines(self.record())[:2]])

    def __repr__(self) -> str:
        return "<Findings: " + "\n ".join(summary_lines(self.record())) + ">"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a findings file, with the same bytes as `detect_intruder_dimensions`; create missing directories.

        Parameters
        ----------
        path
            The file. It appears complete or not at all.
        overwrite
            Whether to replace existing findings; any other file is never replaced unless it is empty.

        Raises
        ------
        OutputExistsError
            If another file exists there; this is a `FileExistsError`.
        OutputError, StorageError, LockedError
            If the file cannot be written.
        """
        path = Path(path)
        journal = journal_of(path)
        arrays = {name: t for m in self for name, t in m.arrays().items()}
        check_file_path(path, FILE_NAME, journal.name)
        check_replaced(path, overwrite, is_findings_file, "findings")
        if journal.exists() and not overwrite:
            do = "finish that run, choose another output, or pass overwrite=True"
            raise errors.OutputExistsError(f"{path}: an interrupted run has its journal there; {do}", journal)
        shard = self.file_plan(path.name, [m.figures() for m in self], header_entries(arrays))
        check_space(path, shard.nbytes)
        with locked(lock_of(path), path):
            remove_partials(path.parent, {path.name, journal.name})
            write_sealed(path.parent, shard, lambda info: [as_bytes(arrays[info.name])])
            journal.unlink(missing_ok=True)


def load_findings(path: str | Path) -> Findings:
    """Read a findings file and check its digest; its vectors are read from a memory map when they are used.

    Parameters
    ----------
    path
        A file that `detect_intruder_dimensions`, ``streamer detect`` or `Findings.save` wrote.

    Raises
    ------
    FormatError
        If it is not a findings file, or is damaged or incomplete.
    """
    path = Path(path)
    if path.is_dir():
        raise errors.FormatError(f"{path}: expected a findings file, found a directory; name the findings file in it")
    file = TensorFile(path)
    text = file.header.metadata.get("findings")
    if file.header.metadata.get("schema") != FINDINGS_SCHEMA or text is None:
        content = "another safetensors file; make them"
        if COEFFICIENTS in file.header.metadata:
            content = "coefficients; pass them with --coefficients (coefficients=), and make findings"
        raise errors.FormatError(f"{path}: expected findings ({FINDINGS_SCHEMA}), found {content} with `streamer detect`")
    try:
        tree = json.loads(text)
        options = DetectionOptions(**tree["options"])
        data = file.data()  # one map for all: one for each matrix would exhaust the descriptors
        matrices = tuple(_read_matrix(figures, file, data) for figures in tree["matrices"])
        check_identities(tree["base"], tree["adapter"])
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        what = f"findings are not as {FINDINGS_SCHEMA} has them ({type(e).__name__}: {e})"
        raise errors.FormatError(f"{path}: {what}; run detect again") from e
    file.check_digest("run detect again")
    return Findings(tree["base"], tree["adapter"], options, matrices, file, _sources(file))


def _read_matrix(figures: dict[str, Any], file: TensorFile, data: memoryview) -> MatrixFinding:
    """Read the finding with these figures from an open, mapped findings file.

    Raises
    ------
    KeyError, TypeError, ValueError
        If figures or arrays do not follow the schema.
    """
    json_types.check(figures, FIGURES)
    arrays: dict[str, Tensor] = {}
    for key in ARRAYS:
        info = file.header.by_name[f"{figures['tensor']}/{key}"]
        if info.dtype not in DTYPE_NAMES.values():
            raise ValueError(f"tensor {info.name!r} is {info.dtype}")
        arrays[key] = as_tensor(data[info.start : info.end], TORCH_DTYPES[info.dtype], info.shape)
    m, n = figures["shape"]
    q = len(arrays["intruders"])
    k = len(arrays["singular_values"])
    expected = {"U": (m, q), "S": (q,), "Vh": (q, n)} | dict.fromkeys(NUMBERS, (k,))
    for key, shape in expected.items():
        if tuple(arrays[key].shape) != shape:
            raise ValueError(f"{figures['tensor']}/{key}: expected shape {shape}, found {tuple(arrays[key].shape)}")
    if not all_finite(arrays["S"]):
        raise ValueError(f"{figures['tensor']}/S holds NaN or Inf")
    numbers: dict[str, Any] = {key: tuple(arrays[key].tolist()) for key in (*NUMBERS, "intruders")}
    for what, ranks in (("intruders", numbers["intruders"]), ("degenerate", figures["degenerate"])):
        among = k > 0 and all(type(j) is int and 0 <= j < k for j in ranks)
        if not among or any(a >= b for a, b in itertools.pairwise(ranks)):
            raise ValueError(f"{figures['tensor']}: {what} must be ascending ranks below {k}")
    matrix_figures = {key: figures[key] for key in FIGURES} | {"shape": (m, n), "degenerate": tuple(figures["degenerate"])}
    decided = {key: matrix_figures.pop(key) for key in FIGURES if key in Detection.__dataclass_fields__}
    decided |= numbers | {key: arrays[key] for key in TRIPLET_PARTS}
    return MatrixFinding(**matrix_figures, detection=Detection(**decided))


def _sources(file: TensorFile) -> dict[str, dict[str, str]]:
    """Read the names of the inputs from a findings file's stamp; return {} if it has none."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):
        tree = json.loads(file.header.metadata[STAMP])
        return {what: {k: v for k, v in tree[what].items() if isinstance(v, str)} for what in ("base", "adapter")}
    return {}


def is_findings_file(path: Path) -> bool:
    """Test whether a file's header declares findings of this schema."""
    with contextlib.suppress(errors.InputError):
        return TensorFile(path).header.metadata.get("schema") == FINDINGS_SCHEMA
    return False


SAMPLED = 32
"""Number of evenly spaced rows and columns of the base's matrix whose crossings are hashed."""

_NOT_OF_DELTA = {"inference_mode"}
"""Numbers and flags of an adapter's config that do not affect its delta."""


def fingerprint(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor] | None = None,
                weight: Weight | None = None) -> str | None:
    """Hash (SHA-256, hex) the values that determine the findings for a matrix, all as float64.

    These are its shape, a sample of W0, and the module's scaling and whole tensors. This is not a checksum of W0: a change outside the
    sample goes unnoticed.

    Parameters
    ----------
    tensors, weight
        The module's tensors and the matrix's weight, if already read.

    Returns
    -------
    str or None
        None for a fine-tuned model used as an adapter, which is compared by its files.
    """
    if plan.adapter.describes_model:
        return None
    module = target.module
    weight = weight or plan.weights[target.tensor]
    tensors = tensors or plan.adapter.tensors
    digest = hashlib.sha256(json.dumps([list(module.shape), float(module.scaling).hex()]).encode())
    rows, columns = ([i * (n - 1) // max(1, min(n, SAMPLED) - 1) for i in range(min(n, SAMPLED))] for n in weight.matrix)
    source = weight.at_hand()
    sample = torch.stack([source.rows(i, i + 1)[0, columns].double() for i in rows])
    values: Iterable[tuple[str, Tensor]]
    if isinstance(module, LoraModule):
        slices = (*module.expert_slices, ())
        parts = zip(("A", "B", "magnitude"), module.tensor_names, slices, strict=False)
        values = ((role, values_of(tensors[name], index)) for role, name, index in parts)
    else:  # the numbers in the config of a method other than LoRA count, too
        stated = sorted((k, float(v)) for k, v in module.config.values.items() if isinstance(v, int | float))
        numbers = ((key, torch.tensor(value)) for key, value in stated if key not in _NOT_OF_DELTA)
        by_role = ((role, values_of(module.stored(tensors[name]))) for role, name in sorted(module.tensors.items()))
        values = itertools.chain(by_role, numbers)
    for role, part in itertools.chain([("", sample.T if target.transposed else sample)], values):
        digest.update(role.encode())
        digest.update(part.double().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def lacking(where: str, missing: int, count: int, first: str) -> errors.MismatchError:
    """Make the error for findings that lack matrices of an adapter."""
    what = f"has no findings on {missing} of {count} matrices, {first} first"
    return errors.MismatchError(f"{where}: {what}; pass those on all matrices, or run detect again")


def matched_findings(plan: Plan, findings: Findings, where: str) -> Findings:
    """Change the names and identities in findings to another location of the same model, in files or in memory.

    Matrices are matched by the adapter's modules; equal fingerprints prove that they are the same.

    Raises
    ------
    MismatchError
        If the findings are for another base or adapter, or do not say.
    """
    by_module = {m.module: m for m in findings}
    if without := [t.module.name for t in plan.targets if t.module.name not in by_module]:
        raise lacking(where, len(without), len(plan.targets), f"module {without[0]!r}")
    matrices = []
    for target in plan.targets:
        finding = by_module[target.module.name]
        current = fingerprint(plan, target)
        if finding.fingerprint is None or current is None:
            raise errors.MismatchError(
                f"{where}: does not say by which values {finding.tensor!r} was judged (findings on a fine-tuned model do not), so they "
                "may differ from the values here; run detect again"
            )
        if finding.fingerprint != current:
            raise errors.MismatchError(
                f"{where}: {finding.tensor!r} was judged with other values than {plan.base.path} and {plan.adapter.path} have; run "
                "detect again on these (a model that was loaded in a narrower dtype than its files has other values)"
            )
        matrices.append(replace(finding, tensor=target.tensor))
    return replace(findings, base=plan.base_identity, adapter=plan.adapter_identity, matrices=tuple(matrices))
