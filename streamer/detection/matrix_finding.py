"""One matrix of the findings: decisions and factors, as JSON values and arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast, get_type_hints

import torch
from torch import Tensor

from streamer.detection.findings_records import MatrixFigures, MatrixRecord
from streamer.detection.intruders import Detection

FACTORS = ("U", "S", "Vh")
NUMBERS = ("singular_values", "similarity", "similarity_low", "similarity_high", "base_singular_values")
ARRAYS = (*FACTORS, *NUMBERS, "intruders")
"""The arrays of a matrix, in file order."""

DECISIONS = tuple(key for key in get_type_hints(MatrixFigures) if key in Detection.__dataclass_fields__)
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
        return cast("MatrixFigures", own | {name: getattr(self.detection, name) for name in DECISIONS})

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
