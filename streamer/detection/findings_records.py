"""Types of the JSON of findings: options, and the figures of each matrix (schema ``streamer.findings/1``)."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from streamer.storage.identities import AdapterIdentity, BaseIdentity


class OptionsRecord(TypedDict):
    """Options that decided the findings; see `DetectionOptions`."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    max_memory: int | None


class MatrixFigures(TypedDict):
    """Figures of a matrix, its arrays apart; see `MatrixFinding` and `Detection`. Ranks count from 0."""

    tensor: str
    module: str
    shape: list[int]
    dtype: str
    rank: int
    scale: float
    transposed: bool
    fingerprint: str | None
    certified: bool
    degenerate: list[int]
    solver: str
    escalated: bool
    precision: str
    steps: int
    products: int
    cutoff: float
    delta_norm: float
    intruder_energy: float
    dropped_at_zero: float


class CoefficientMeans(TypedDict):
    """Mean coefficients of a matrix: of its whole delta, of all its intruders, and of each; None of what the delta has no part in."""

    mean: float | None
    intruders_mean: float | None
    intruders: list[float | None]


class MatrixRecord(MatrixFigures):
    """A matrix in the JSON that `streamer report` prints. `intruders` are ranks from 0; `seconds` is None where a file was read.

    `coefficients` stand there where some are given.
    """

    singular_values: list[float]
    similarity: list[float]
    similarity_low: list[float]
    similarity_high: list[float]
    base_singular_values: list[float]
    intruders: list[int]
    seconds: float | None
    coefficients: NotRequired[CoefficientMeans]


class CoefficientTotals(TypedDict):
    """Which coefficients were given, and their means over the deltas and over the intruders of all matrices."""

    keep: float
    sha256: str
    mean: float | None
    intruders_mean: float | None


class TotalsRecord(TypedDict):
    """Counts over all matrices, and the seconds that detection took, where it was run."""

    matrices: int
    intruders: int
    certified: int
    escalated: int
    degenerate: int
    looks_like_another_base: bool | None
    seconds: float | None
    coefficients: NotRequired[CoefficientTotals]


class FindingsRecord(TypedDict):
    """The object that ``streamer report --json`` prints."""

    schema: str
    base: BaseIdentity
    adapter: AdapterIdentity
    options: OptionsRecord
    totals: TotalsRecord
    matrices: list[MatrixRecord]
