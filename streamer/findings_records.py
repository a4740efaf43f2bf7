"""The JSON of findings, as types: identities of the inputs, options, and the figures of each matrix (schema ``streamer.findings/1``)."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class FileIdentity(TypedDict):
    """What tells a safetensors file from another: its name, size, and SHA-256 (hex) of its header and of a sample of each tensor."""

    file: str
    bytes: int
    header_sha256: str
    sample_sha256: str


class BaseIdentity(TypedDict):
    """What tells a base model from another, wherever it lies."""

    files: list[FileIdentity]


class AdapterIdentity(TypedDict):
    """What tells an adapter from another, wherever it lies: digests of its weights and config; of a fine-tuned model its files."""

    base_is_residual: NotRequired[bool]

    modules: int
    weights_sha256: NotRequired[str]
    config_sha256: NotRequired[str]
    base_model_name_or_path: NotRequired[str | None]
    files: NotRequired[list[FileIdentity]]


class OptionsRecord(TypedDict):
    """What decided the findings; see `DetectionOptions`."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    max_memory: int | None


class MatrixFigures(TypedDict):
    """Everything that is known of a matrix but its arrays; see `MatrixFinding` and `Detection`. Ranks count from 0."""

    tensor: str
    module: str
    shape: list[int]
    dtype: str
    rank: int
    scale: float
    certified: bool
    degenerate: list[int]
    solver: str
    escalated: bool
    steps: int
    products: int
    cutoff: float
    delta_norm: float
    intruder_energy: float
    dropped_at_zero: float


class MatrixRecord(MatrixFigures):
    """A matrix in the JSON that `streamer report` prints. `intruders` are ranks from 0; `seconds` is None where a file was read."""

    singular_values: list[float]
    similarity: list[float]
    similarity_low: list[float]
    similarity_high: list[float]
    intruders: list[int]
    seconds: float | None


class TotalsRecord(TypedDict):
    """Counts over all matrices, and the seconds that detection took, where it was run."""

    matrices: int
    intruders: int
    certified: int
    escalated: int
    degenerate: int
    seconds: float | None


class FindingsRecord(TypedDict):
    """The object that ``streamer report --json`` prints."""

    schema: str
    base: BaseIdentity
    adapter: AdapterIdentity
    options: OptionsRecord
    totals: TotalsRecord
    matrices: list[MatrixRecord]
