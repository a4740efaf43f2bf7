"""The findings: what was detected, for each matrix, and from which base, adapter and options.

On disk they are one safetensors file. For the base tensor ``T`` it holds ``T/U`` (m, q), ``T/S`` (q,), ``T/Vh`` (q, n), the
intruders' triplets; ``T/intruders`` (q,) int64; ``T/singular_values``, ``T/similarity`` and its
``T/similarity_low``, ``T/similarity_high`` (k,) float64.
The metadata's ``findings`` is JSON: identity, options, and the figures of each matrix. While detection runs, each matrix is a
record in a journal beside the file; a record is itself a safetensors file of these tensors, and the end puts them together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.encodings import TORCH_DTYPES, as_bytes, as_tensor
from streamer.errors import FormatError, MismatchError
from streamer.intruders import Detection, DetectionOptions
from streamer.linalg.operators import all_finite
from streamer.records import STAMP
from streamer.storage.tensorfile import TensorFile

SCHEMA = "streamer.findings/1"

ARRAYS = ("U", "S", "Vh", "singular_values", "similarity", "similarity_low", "similarity_high", "intruders")
_FIGURES: dict[str, type] = {
    "certified": bool,
    "degenerate": list,
    "solver": str,
    "escalated": bool,
    "steps": int,
    "products": int,
    "cutoff": float,
    "delta_norm": float,
    "intruder_energy": float,
    "dropped_at_zero": float,
}
_OWN: dict[str, type] = {"tensor": str, "module": str, "shape": list, "dtype": str, "rank": int, "scale": float}
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


@dataclass(frozen=True)
class MatrixFinding:
    """What was found in one matrix.

    Attributes
    ----------
    tensor, module
        Its name in the base, and in the adapter.
    shape
        (out, in), whatever the order on disk.
    dtype
        The base tensor's dtype, in the format's spelling.
    rank, scale
        The adapter's, for this module.
    detection
        Decisions and factors. From a file, the factors are read through a map, when they are used.
    seconds
        How long detection took; None where it was read from a file, which holds no times.
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    dtype: str
    rank: int
    scale: float
    detection: Detection
    seconds: float | None = None

    def figures(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        own = {"tensor": self.tensor, "module": self.module, "shape": list(self.shape), "dtype": self.dtype,
               "rank": self.rank, "scale": self.scale}  # fmt: skip
        return own | {name: getattr(self.detection, name) for name in _FIGURES}

    def arrays(self) -> dict[str, Tensor]:
        """The arrays by key, in file order."""
        d = self.detection
        numbers = {name: torch.tensor(getattr(d, name), dtype=torch.float64) for name in ARRAYS[3:7]}
        return {"U": d.U, "S": d.S, "Vh": d.Vh, **numbers, "intruders": torch.tensor(d.intruders, dtype=torch.int64)}


@dataclass(frozen=True)
class Findings:
    """All matrices of an adapter, in the base's file order.

    Attributes
    ----------
    base, adapter
        The identities of the inputs (sizes, digests); no paths, so that the same inputs give the same bytes anywhere.
    options
        What decided the findings.
    matrices
        One entry a matrix.
    sources
        ``base`` and ``adapter``: names, and ids where they are known; they do not decide whether findings fit other inputs.
    """

    base: Mapping[str, Any]
    adapter: Mapping[str, Any]
    options: DetectionOptions
    matrices: tuple[MatrixFinding, ...]
    _file: TensorFile | None = field(default=None, repr=False, compare=False)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def by_tensor(self) -> dict[str, MatrixFinding]:
        """Entries by the base tensor's name."""
        return {m.tensor: m for m in self.matrices}

    @property
    def intruders(self) -> int:
        """Intruders in all matrices."""
        return sum(len(m.detection.intruders) for m in self.matrices)

    def digest(self) -> str:
        """SHA-256 (hex) over the decisions and factors of all matrices: what they would do to a delta."""
        digest = hashlib.sha256()
        for m in self.matrices:
            digest.update(f"{m.tensor}{m.detection.intruders}".encode())
            for factor in (m.detection.U, m.detection.S, m.detection.Vh):
                digest.update(as_bytes(factor))
        return digest.hexdigest()

    def check_matches(
        self, base: Mapping[str, Any], adapter: Mapping[str, Any], options: DetectionOptions | None
    ) -> None:
        """Refuse to be used with another base, adapter or options than they were made with.

        Raises
        ------
        MismatchError
            Which of them differs, and how.
        """
        where = self._file.path if self._file else "findings"
        for what, mine, theirs in (("base", self.base, base), ("adapter", self.adapter, adapter)):
            if mine != theirs:
                raise MismatchError(
                    f"{where}: made with another {what} ({_difference(mine, theirs)}); run detect again on this one"
                )
        for name, value in (options.as_dict() if options else {}).items():
            mine_value = self.options.as_dict()[name]
            # Which solver made them, in what memory, does not matter to who uses them, unless one was asked for.
            if value != mine_value and not ((name == "solver" and value == "auto") or name == "max_memory"):
                raise MismatchError(
                    f"{where}: made with {name}={mine_value!r}, asked for {value!r}; pass the same, or run detect again"
                )

    def __iter__(self) -> Iterator[MatrixFinding]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
    if "files" in keys:
        a, b = mine.get("files", []), theirs.get("files", [])
        if [f["file"] for f in a] != [f["file"] for f in b]:
            return f"files {[f['file'] for f in a][:3]} against {[f['file'] for f in b][:3]}"
        changed = next(x["file"] for x, y in zip(a, b, strict=True) if x != y)
        return f"the content of {changed} differs"
    return f"{', '.join(keys)} differ"


def detection_digest(
    base: Mapping[str, Any], adapter: Mapping[str, Any], options: DetectionOptions, tensors: Sequence[str]
) -> str:
    """SHA-256 over everything that decides the findings' bytes."""
    plan = {"schema": SCHEMA, "base": base, "adapter": adapter, "options": options.as_dict(), "tensors": list(tensors)}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def load_findings(path: str | Path) -> Findings:
    """Read a findings file.

    Raises
    ------
    FormatError
        If it is not one, or not whole.
    """
    if Path(path).is_dir():
        raise FormatError(f"{path}: expected a findings file, found a directory; name the findings file in it")
    file = TensorFile(Path(path))
    text = file.header.metadata.get("findings")
    if file.header.metadata.get("schema") != SCHEMA or text is None:
        raise FormatError(
            f"{path}: expected findings ({SCHEMA}), found another safetensors file; make them with `streamer detect`"
        )
    try:
        tree = json.loads(text)
        options = DetectionOptions(**tree["options"])
        data = file.data()  # one map for all: a map each would run out of descriptors
        matrices = tuple(_matrix(figures, file, data) for figures in tree["matrices"])
        _check_identities(tree["base"], tree["adapter"])
        return Findings(tree["base"], tree["adapter"], options, matrices, file, _sources(file))
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise FormatError(
            f"{path}: findings are not as {SCHEMA} has them ({type(e).__name__}: {e}); run detect again"
        ) from e


def _sources(file: TensorFile) -> dict[str, dict[str, str]]:
    """What the stamp of a findings file calls the inputs; nothing where it has none."""
    try:
        tree = json.loads(file.header.metadata[STAMP])
        return {what: {k: v for k, v in tree[what].items() if isinstance(v, str)} for what in ("base", "adapter")}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _check_identities(*identities: Any) -> None:
    for identity in identities:
        files = identity.get("files", []) if isinstance(identity, dict) else None
        if not isinstance(files, list) or not all(
            isinstance(f, dict) and isinstance(f.get("file"), str) for f in files
        ):
            raise ValueError("an input's identity is not one")


def _check_figures(figures: Any) -> None:
    for key, kind in {**_OWN, **_FIGURES}.items():
        value = figures[key]
        fits = type(value) in ({int, float} if kind is float else {kind})
        if kind is list:
            fits = fits and all(type(i) is int and i >= 0 for i in value)
        if not fits:
            raise TypeError(f"{key} is {type(value).__name__}")


def _matrix(figures: dict[str, Any], file: TensorFile, data: memoryview) -> MatrixFinding:
    _check_figures(figures)
    arrays: dict[str, Tensor] = {}
    for key in ARRAYS:
        info = file.header.by_name[f"{figures['tensor']}/{key}"]
        if info.dtype not in DTYPE_NAMES.values():
            raise ValueError(f"tensor {info.name!r} is {info.dtype}")
        arrays[key] = as_tensor(data[info.start : info.end], TORCH_DTYPES[info.dtype], info.shape)
    m, n = figures["shape"]
    q, k = len(arrays["intruders"]), len(arrays["singular_values"])
    expected = {
        "U": (m, q),
        "S": (q,),
        "Vh": (q, n),
        "similarity": (k,),
        "similarity_low": (k,),
        "similarity_high": (k,),
    }
    for key, shape in expected.items():
        if tuple(arrays[key].shape) != shape:
            raise ValueError(f"{figures['tensor']}/{key}: expected shape {shape}, found {tuple(arrays[key].shape)}")
    if not all_finite(arrays["S"]):
        raise ValueError(f"{figures['tensor']}/S holds NaN or Inf")
    numbers: dict[str, Any] = {key: tuple(arrays[key].tolist()) for key in ARRAYS[3:]}
    if k == 0 or not all(type(j) is int and 0 <= j < k for j in (*numbers["intruders"], *figures["degenerate"])):
        raise ValueError(f"{figures['tensor']}: its intruders are not among its {k} directions")
    chosen: dict[str, Any] = {key: figures[key] for key in _FIGURES} | {"degenerate": tuple(figures["degenerate"])}
    detection = Detection(U=arrays["U"], S=arrays["S"], Vh=arrays["Vh"], **numbers, **chosen)
    return MatrixFinding(figures["tensor"], figures["module"], (m, n), figures["dtype"],
                         figures["rank"], figures["scale"], detection)  # fmt: skip
