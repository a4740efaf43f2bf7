"""Lay out, read and write a findings file.

Findings are stored as one safetensors file. For the base tensor ``T`` it holds the intruders' triplets ``T/U`` (m, q), ``T/S`` (q,) and
``T/Vh`` (q, n); ``T/singular_values``, ``T/similarity``, ``T/similarity_low``, ``T/similarity_high``, ``T/base_singular_values`` (k,)
float64; and ``T/intruders`` (q,) int64. The metadata's ``findings`` is JSON: identities, options, and the figures of each matrix.

Define the finding for one matrix: decisions and factors, as JSON values and arrays.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor

from streamer.detection.intruders import Detection
from streamer.detection.options import STAMP, DetectionOptions, detection_record, stamp
from streamer.errors import FormatError, InputError, OutputExistsError
from streamer.json_types import Amount, Encoding, ModuleName, Rank, Scale, Shape, TensorName, check
from streamer.linalg.operators import all_finite
from streamer.plan.plan import Plan
from streamer.plan.sources import NameSource, in_short
from streamer.storage.atomic_file import Buffer, ShardPlan, plan_shard, remove_partials, write_sealed
from streamer.storage.files import AdapterIdentity, BaseIdentity, check_identities, locked
from streamer.storage.header import DIGEST, NO_DIGEST, TensorInfo
from streamer.storage.journal import journal_of, lock_of
from streamer.storage.tensor_file import TensorFile
from streamer.storage.transaction import check_file_path, check_replaced, check_space
from streamer.weights.base import TORCH_DTYPES, as_bytes, as_tensor

FACTORS = ("U", "S", "Vh")
NUMBERS = ("singular_values", "similarity", "similarity_low", "similarity_high", "base_singular_values")
ARRAYS = (*FACTORS, *NUMBERS, "intruders")
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
        Digest of the values behind the decisions (see `findings.fingerprint`); None for a fine-tuned model.
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
        own, decisions = ({f.name: getattr(part, f.name) for f in fields(part)} for part in (self, self.detection))
        seconds = own.pop("seconds")
        tree = {**own, **decisions, "seconds": seconds}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in tree.items() if k not in (*FACTORS, "detection")}

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by key, in file order."""
        d = self.detection
        numbers = {name: torch.tensor(getattr(d, name), dtype=torch.float64) for name in NUMBERS}
        return {"U": d.U, "S": d.S, "Vh": d.Vh, **numbers, "intruders": torch.tensor(d.intruders, dtype=torch.int64)}


SCHEMA: Final = "streamer.findings/1"

FILE_NAME = "findings.safetensors"
"""Example of a findings file's name."""

COEFFICIENTS = "streamer.coefficients"
"""Metadata key of coefficients files, used to recognise one that was passed instead of findings."""

DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""

OF_DETECTION = Detection.__dataclass_fields__.keys()

FIGURES = {
    key: hint
    for part in (MatrixFinding, Detection)
    for key, hint in get_type_hints(part, include_extras=True).items()
    if key not in (*ARRAYS, "detection", "seconds")
}
"""The figures of a matrix in the metadata, with their types."""


class FindingsHead(NamedTuple):
    """Inputs and options of findings: everything except the matrices; see `Findings`."""

    base: BaseIdentity
    adapter: AdapterIdentity
    options: DetectionOptions
    sources: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, plan: Plan, options: DetectionOptions) -> FindingsHead:
        """Describe the findings of a plan."""
        base, adapter = plan.sources
        sources = {"base": in_short(base), "adapter": in_short(adapter)}
        return cls(plan.base_identity, plan.adapter_identity, options, sources)

    def digest(self, tensors: Iterable[str]) -> str:
        """Hash (SHA-256, hex) everything that determines the bytes of findings for these tensors, in file order."""
        inputs = {"base": self.base, "adapter": self.adapter, "options": self.options.as_dict()}
        plan = {"schema": SCHEMA, **inputs, "tensors": list(tensors)}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def matrix_entries(tensor: str, arrays: Mapping[str, Tensor]) -> list[Entry]:
    """List the entries of one matrix: ``q.weight`` → ``q.weight/U``, ``q.weight/S`` and so on."""
    return [(f"{tensor}/{key}", DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in arrays.items()]


def plan_findings_file(
    name: str, head: FindingsHead, matrices: Sequence[Mapping[str, Any]], entries: Iterable[Entry]
) -> ShardPlan:
    """Lay out a findings file. Equal findings give equal bytes, written directly or through a journal."""
    tree = {"base": head.base, "adapter": head.adapter, "options": head.options.as_dict(), "matrices": matrices}
    metadata = {"schema": SCHEMA, "findings": json.dumps(tree), DIGEST: NO_DIGEST}
    if head.sources:
        detection = detection_record(head.options, sum(m["certified"] is True for m in matrices), len(matrices))
        base, adapter = (cast(NameSource, head.sources[what]) for what in ("base", "adapter"))
        metadata[STAMP] = stamp("detect", base, adapter, detection)
    return plan_shard(name, list(entries), metadata)


def is_findings_file(path: Path) -> bool:
    """Test whether a file's header declares findings of this schema."""
    try:
        return TensorFile(path).header.metadata.get("schema") == SCHEMA
    except InputError:
        return False


def save_findings_file(path: Path, head: FindingsHead, matrices: Sequence[MatrixFinding], overwrite: bool) -> None:
    """Write a findings file atomically; create missing directories.

    Parameters
    ----------
    overwrite
        Whether to replace findings at the path and the journal of an interrupted run. An empty file is always replaced.

    Raises
    ------
    OutputExistsError
        If another file exists there.
    OutputError, StorageError, LockedError
        If the file cannot be written.
    """
    check_file_path(path, FILE_NAME, journal_of(path).name)
    check_replaced(path, overwrite, is_findings_file, "findings")
    if journal_of(path).exists() and not overwrite:
        raise OutputExistsError(
            f"{path}: an interrupted run has its journal there; finish that run, choose another output, or pass overwrite=True",
            journal_of(path),
        )
    by_tensor = {m.tensor: m for m in matrices}
    entries = [entry for m in matrices for entry in matrix_entries(m.tensor, m.arrays())]
    shard = plan_findings_file(path.name, head, [m.figures() for m in matrices], entries)

    def source(info: TensorInfo) -> Iterator[Buffer]:
        tensor, _, key = info.name.rpartition("/")
        yield as_bytes(by_tensor[tensor].arrays()[key])

    check_space(path, shard.nbytes)
    with locked(lock_of(path), path):
        remove_partials(path.parent, {path.name, journal_of(path).name})
        write_sealed(path.parent, shard, source)
        journal_of(path).unlink(missing_ok=True)


def read_findings(path: Path) -> tuple[FindingsHead, tuple[MatrixFinding, ...], TensorFile]:
    """Read a findings file and check its digest; see `load_findings`.

    Raises
    ------
    FormatError
        If it is not a findings file, or is damaged or incomplete.
    """
    if path.is_dir():
        raise FormatError(f"{path}: expected a findings file, found a directory; name the findings file in it")
    file = TensorFile(path)
    text = file.header.metadata.get("findings")
    if file.header.metadata.get("schema") != SCHEMA or text is None:
        found = "another safetensors file; make them"
        if COEFFICIENTS in file.header.metadata:
            found = "coefficients; pass them with --coefficients (coefficients=), and make findings"
        raise FormatError(f"{path}: expected findings ({SCHEMA}), found {found} with `streamer detect`")
    try:
        tree = json.loads(text)
        options = DetectionOptions(**tree["options"])
        data = file.data()  # one map for all: one for each matrix would exhaust the descriptors
        matrices = tuple(read_matrix(figures, file, data) for figures in tree["matrices"])
        check_identities(tree["base"], tree["adapter"])
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        what = f"findings are not as {SCHEMA} has them ({type(e).__name__}: {e})"
        raise FormatError(f"{path}: {what}; run detect again") from e
    file.check_digest("run detect again")
    return FindingsHead(tree["base"], tree["adapter"], options, _sources(file)), matrices, file


def read_matrix(figures: dict[str, Any], file: TensorFile, data: memoryview) -> MatrixFinding:
    """Read the finding with these figures from an open, mapped findings file.

    Raises
    ------
    KeyError, TypeError, ValueError
        If figures or arrays do not follow the schema.
    """
    check(figures, FIGURES)
    arrays: dict[str, Tensor] = {}
    for key in ARRAYS:
        info = file.header.by_name[f"{figures['tensor']}/{key}"]
        if info.dtype not in DTYPE_NAMES.values():
            raise ValueError(f"tensor {info.name!r} is {info.dtype}")
        arrays[key] = as_tensor(data[info.start : info.end], TORCH_DTYPES[info.dtype], info.shape)
    m, n = figures["shape"]
    q, k = len(arrays["intruders"]), len(arrays["singular_values"])
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
    own = {key: figures[key] for key in FIGURES} | {"shape": (m, n), "degenerate": tuple(figures["degenerate"])}
    decided = {key: own.pop(key) for key in FIGURES if key in OF_DETECTION}
    decided |= numbers | {key: arrays[key] for key in FACTORS}
    return MatrixFinding(**own, detection=Detection(**decided))


def _sources(file: TensorFile) -> dict[str, dict[str, str]]:
    """Read the names of the inputs from a findings file's stamp; return {} if it has none."""
    try:
        tree = json.loads(file.header.metadata[STAMP])
        return {what: {k: v for k, v in tree[what].items() if isinstance(v, str)} for what in ("base", "adapter")}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}
