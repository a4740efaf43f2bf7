"""One matrix of the findings: decisions and factors, as JSON values and arrays, and read back from a findings file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from streamer.detection.findings_file import ARRAYS, DTYPE_NAMES, NUMBERS
from streamer.detection.findings_records import MatrixFigures, MatrixRecord
from streamer.detection.intruders import Detection
from streamer.linalg.operators import all_finite
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import TORCH_DTYPES, as_tensor

_KINDS: dict[str, set[type]] = {
    key: {int, float}
    if kind is float
    else set(get_args(kind))
    if isinstance(kind, UnionType)
    else {get_origin(kind) or kind}
    for key, kind in get_type_hints(MatrixFigures).items()
}

_DECISIONS = tuple(key for key in get_type_hints(MatrixFigures) if key in Detection.__dataclass_fields__)
"""The figures that are the detection's; the others are the finding's own."""


@dataclass(frozen=True, repr=False)
class MatrixFinding:
    """Findings on one matrix.

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
    transposed
        Whether the base stores (in, out), as embeddings and Conv1D layers do; the output side is judged all the same.
    fingerprint
        Digest of the values that it was made from (see `fingerprints.fingerprint`); None on a fine-tuned model.
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    dtype: str
    rank: int
    scale: float
    detection: Detection
    seconds: float | None = field(default=None, compare=False)
    transposed: bool = False
    fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"<MatrixFinding {self.tensor} {'x'.join(map(str, self.shape))}: {self.detection.summary()}>"

    def figures(self) -> MatrixFigures:
        """Return all but the arrays, as JSON values."""
        own = {"tensor": self.tensor, "module": self.module, "shape": list(self.shape), "dtype": self.dtype,
               "rank": self.rank, "scale": self.scale, "transposed": self.transposed,
               "fingerprint": self.fingerprint}  # fmt: skip
        return cast("MatrixFigures", own | {name: getattr(self.detection, name) for name in _DECISIONS})

    def record(self) -> MatrixRecord:
        """Return all but the vectors, as JSON values: what `streamer report --json` has of a matrix."""
        d = self.detection
        numbers = {name: list(getattr(d, name)) for name in (*NUMBERS, "intruders", "degenerate")}
        return cast("MatrixRecord", {**self.figures(), **numbers, "seconds": self.seconds})

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by key, in file order."""
        d = self.detection
        numbers = {name: torch.tensor(getattr(d, name), dtype=torch.float64) for name in NUMBERS}
        return {"U": d.U, "S": d.S, "Vh": d.Vh, **numbers, "intruders": torch.tensor(d.intruders, dtype=torch.int64)}


def check_figures(figures: Any) -> None:
    """Check that the figures of a matrix are all there, each of its kind; `KeyError` or `TypeError` where not."""
    for key, kinds in _KINDS.items():
        value = figures[key]
        fits = type(value) in kinds
        if kinds == {list}:
            fits = fits and all(type(i) is int and i >= 0 for i in value)
        if not fits:
            raise TypeError(f"{key} is {type(value).__name__}")


def read_matrix(figures: dict[str, Any], file: TensorFile, data: memoryview) -> MatrixFinding:
    """Read the finding of these figures from an open findings file, whose data are mapped.

    Raises
    ------
    KeyError, TypeError, ValueError
        If figures or arrays are not as the schema has them.
    """
    check_figures(figures)
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
    chosen: dict[str, Any] = {key: figures[key] for key in _DECISIONS} | {"degenerate": tuple(figures["degenerate"])}
    detection = Detection(U=arrays["U"], S=arrays["S"], Vh=arrays["Vh"], **numbers, **chosen)
    return MatrixFinding(figures["tensor"], figures["module"], (m, n), figures["dtype"],
                         figures["rank"], figures["scale"], detection, transposed=figures["transposed"],
                         fingerprint=figures["fingerprint"])  # fmt: skip
