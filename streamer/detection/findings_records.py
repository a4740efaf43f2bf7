"""Define the JSON types of findings: options, and the figures of each matrix (schema ``streamer.findings/1``)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from streamer.json_types import Amount, Count, Keywords, ModuleName, OutputPath, Share, State, TensorName
from streamer.plan.sources import AdapterSource, BaseSource

# fmt: off
Shape = Annotated[list[int], Keywords(minItems=2, maxItems=2),
    "Rows (outputs) and columns (inputs) of the matrix, whatever its order on disk."]
PerDirection = Annotated[list[float], "For each judged direction, by falling singular value:"]
Ranks = Annotated[list[Count], "0-based ranks of singular directions of base + delta, 0 for the largest (tables count from 1):"]

class DecidingOptions(TypedDict):
    """Options that decide which directions are intruders."""
    top_k: Annotated[float, Keywords(exclusiveMinimum=0), "Leading directions that are judged: an integer is a number of them, any other "
        "number a share of the short side."]
    threshold_epsilon: Annotated[float, Keywords(exclusiveMinimum=0, maximum=1), "A direction whose similarity to the base is below this "
        "is an intruder."]
    solver: Annotated[str, Keywords(enum=["auto", "certified", "dense"]), "The solver that was requested."]

class OptionsRecord(DecidingOptions):
    """Options that decided the findings; see `DetectionOptions`."""
    max_memory: Annotated[Count | None, "Limit on anonymous memory in bytes, or null."]

class MatrixHead(TypedDict):
    """A matrix that the adapter changes."""
    tensor: TensorName
    module: ModuleName
    shape: Shape
    dtype: Annotated[str, "Encoding in the base: a dtype of the safetensors format, or an encoding of quantized weights."]
    rank: Annotated[Count, "Rank of the adapter's factors for this module; 0 if it has none."]
    scale: Annotated[float, "Factor of B A, from the adapter's alpha and rank."]

class MatrixFigures(MatrixHead):
    """Figures of a matrix without its arrays; see `MatrixFinding` and `Detection`. Ranks count from 0."""
    transposed: Annotated[bool, "Whether it is stored as (inputs, outputs), like embeddings and Conv1D layers. Decisions still use the "
        "output side, whose vectors are the right singular vectors of the stored matrix."]
    fingerprint: Annotated[str | None, "Digest of the values behind the decisions: a sample of the base's, and the adapter's (SHA-256, "
        "hexadecimal). Null for a fine-tuned model."]
    certified: Annotated[bool, "Every direction's interval lies on one side of epsilon, and none is degenerate."]
    degenerate: Annotated[Ranks, "directions in so tight a cluster that no single vector is defined."]
    solver: Annotated[str, Keywords(enum=["certified", "dense"]), "The solver that decided."]
    escalated: Annotated[bool, "Whether the certified solver was tried first and the dense one decided."]
    precision: Annotated[str, Keywords(enum=["float32", "float64"]), "Precision of the decisions. float64 for a base in another dtype "
        "means that rounding in float32 left a direction open, and the matrix was computed again."]
    steps: Annotated[Count, "Block steps that the certificate needed."]
    products: Annotated[Count, "Products with the base that the certificate needed."]
    cutoff: Annotated[Amount, "The certificate does not cover base singular values below this share of the largest; 0: it covers all."]
    delta_norm: Annotated[Amount, "Frobenius norm of the delta."]
    intruder_energy: Annotated[Share, "The intruders' share of the delta's squared norm."]
    dropped_at_zero: Annotated[Amount, "Share of the mitigated delta's norm that projection onto the adapter's rank would lose at lambda 0 "
        "with --method paper."]

class MatrixRecord(MatrixFigures):
    """Result for one matrix."""
    singular_values: Annotated[PerDirection, "singular values of base + delta."]
    similarity: Annotated[PerDirection, "similarity to the nearest left singular vector of the base, as used for the decision."]
    similarity_low: Annotated[PerDirection, "lower end of an interval around the similarity."]
    similarity_high: Annotated[PerDirection, "upper end of the interval."]
    base_singular_values: Annotated[PerDirection, "the largest singular values of the base, or Ritz values, which are at most as large."]
    intruders: Annotated[Ranks, "the intruders."]
    seconds: Annotated[Amount | None, "Wall time in s of detection; null if the findings come from a file."]

class TotalsRecord(TypedDict):
    """Totals over all matrices."""
    matrices: Annotated[Count, "Number of matrices."]
    intruders: Annotated[Count, "Intruders in all matrices."]
    certified: Annotated[Count, "Matrices with certified decisions only."]
    escalated: Annotated[Count, "Matrices that the certified solver could not decide, so the dense solver did."]
    degenerate: Annotated[Count, "Matrices with directions in so tight a cluster that no single vector is defined."]
    looks_like_another_base: Annotated[bool | None, "Whether in most matrices the leading direction is an intruder, one of several, and no "
        "closer to the base than a random vector. Then the adapter was probably trained on another base. Null if undecidable: at least 8 "
        "matrices are needed, large enough that a random vector is clearly below threshold_epsilon."]
    seconds: Annotated[Amount | None, "Wall time in s of detection, for the matrices that this run computed; null if there are none."]

class FindingsRecord(TypedDict):
    """The intruder dimensions of an adapter, as printed by `streamer detect --json` and `streamer report --json`."""
    schema: Literal["streamer.findings/1"]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model used as one, described in the same way."]
    options: Annotated[OptionsRecord, "Options that determined the findings."]
    totals: Annotated[TotalsRecord, "Totals over all matrices."]
    matrices: Annotated[list[MatrixRecord], "One entry per matrix, in the base's file order."]
    output: NotRequired[Annotated[OutputPath, "Only for detect."]]
    state: NotRequired[Annotated[State, "Only for detect."]]
