"""Define the finding for one matrix: decisions and factors, as JSON values and arrays."""

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
"""Figures that belong to the detection; the others belong to the finding."""


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
        Digest of the values behind the decisions (see `fingerprints.fingerprint`); None for a fine-tuned model.
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
        """Return everything except the arrays, as JSON values."""
        own = {"tensor": self.tensor, "module": self.module, "shape": list(self.shape), "dtype": self.dtype,
               "rank": self.rank, "scale": self.scale, "transposed": self.transposed,
               "fingerprint": self.fingerprint}  # fmt: skip
        return cast("MatrixFigures", own | {name: getattr(self.detection, name) for name in DECISIONS})

    def record(self) -> MatrixRecord:
        """Return everything except the vectors, as JSON values: a matrix in `streamer report --json`."""
        d = self.detection
        numbers = {name: list(getattr(d, name)) for name in (*NUMBERS, "intruders", "degenerate")}
        return cast("MatrixRecord", {**self.figures(), **numbers, "seconds": self.seconds})

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays by key, in file order."""
        d = self.detection
        numbers = {name: torch.tensor(getattr(d, name), dtype=torch.float64) for name in NUMBERS}
        return {"U": d.U, "S": d.S, "Vh": d.Vh, **numbers, "intruders": torch.tensor(d.intruders, dtype=torch.int64)}
