"""Types of the JSON of findings: options, and the figures of each matrix (schema ``streamer.findings/1``)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from streamer.json_types import Amount, Count, Keywords, ModuleName, OutputPath, Sha256, Share, State, TensorName
from streamer.plan.sources import AdapterSource, BaseSource

# fmt: off
Shape = Annotated[list[int], Keywords(minItems=2, maxItems=2),
    "Rows (outputs) and columns (inputs) of the matrix, whatever the order on disk."]
PerDirection = Annotated[list[float], "For each judged direction, the largest singular value first:"]
Ranks = Annotated[list[Count], "0-based ranks of singular directions of base + delta, 0 the largest (tables count from 1):"]

class DecidingOptions(TypedDict):
    """Options that decide which directions are intruders."""
    top_k: Annotated[float, Keywords(exclusiveMinimum=0), "Leading directions that are judged: "
        "an integer counts them, any other number is a share of the short side."]
    threshold_epsilon: Annotated[float, Keywords(exclusiveMinimum=0, maximum=1), "A direction whose similarity to the base is below this "
        "is an intruder."]
    solver: Annotated[str, Keywords(enum=["auto", "certified", "dense"]), "The solver that was asked for."]

class OptionsRecord(DecidingOptions):
    """Options that decided the findings; see `DetectionOptions`."""
    max_memory: Annotated[Count | None, "Budget of anonymous memory in bytes, or null."]

class MatrixHead(TypedDict):
    """A matrix that the adapter changes."""
    tensor: TensorName
    module: ModuleName
    shape: Shape
    dtype: Annotated[str, "How the base stores it: a dtype of the safetensors format, or an encoding of quantized weights."]
    rank: Annotated[Count, "Rank of the adapter's factors for this module; 0 where it has none."]
    scale: Annotated[float, "Factor on B A, from the adapter's alpha and rank."]

class MatrixFigures(MatrixHead):
    """Figures of a matrix, its arrays apart; see `MatrixFinding` and `Detection`. Ranks count from 0."""
    transposed: Annotated[bool, "Stored as (inputs, outputs), as embeddings and Conv1D layers are: the output side is judged all the same, "
        "and its vectors are the right singular ones of what stands in the base's file."]
    fingerprint: Annotated[str | None, "Digest of the values that the matrix was judged by: a sample of the base's, and the adapter's "
        "(SHA-256, hexadecimal). Null for a fine-tuned model."]
    certified: Annotated[bool, "Every direction's interval lies on one side of epsilon, and none is degenerate."]
    degenerate: Annotated[Ranks, "directions in a cluster so tight that no single vector is defined."]
    solver: Annotated[str, Keywords(enum=["certified", "dense"]), "The solver that decided."]
    escalated: Annotated[bool, "The certified solver was tried first and gave up for the dense one."]
    precision: Annotated[str, Keywords(enum=["float32", "float64"]), "What the decisions were computed in. float64, where the base is not "
        "stored so: float32 left a direction open for its rounding, and the matrix was done once more."]
    steps: Annotated[Count, "Block steps that the certificate took."]
    products: Annotated[Count, "Products with the base that the certificate took."]
    cutoff: Annotated[Amount, "Base singular values below this share of the largest are not covered by the certificate; 0: all are."]
    delta_norm: Annotated[Amount, "Frobenius norm of the delta."]
    intruder_energy: Annotated[Share, "The intruders' share of the delta's squared norm."]
    dropped_at_zero: Annotated[Amount, "Share of the mitigated delta's norm that projection to the adapter's rank would lose at lambda 0, "
        "--method paper."]

class CoefficientMeans(TypedDict):
    """Mean coefficients of a matrix."""
    mean: Annotated[Share | None, "Mean coefficient of the delta's singular directions, each by its energy; null where the delta is zero."]
    intruders_mean: Annotated[Share | None, "The same of all its intruders; null where there are none."]
    intruders: Annotated[list[Share | None], "The same of each intruder, in the order of their 0-based ranks."]

class MatrixRecord(MatrixFigures):
    """What was found in one matrix."""
    singular_values: Annotated[PerDirection, "singular values of base + delta."]
    similarity: Annotated[PerDirection, "similarity to the nearest left singular vector of the base, as the decision took it."]
    similarity_low: Annotated[PerDirection, "lower end of an interval around the similarity."]
    similarity_high: Annotated[PerDirection, "upper end of it."]
    base_singular_values: Annotated[PerDirection, "largest singular values of the base, or Ritz values, which are at most those."]
    intruders: Annotated[Ranks, "the intruders."]
    seconds: Annotated[Amount | None, "Wall time in s that detection took; null where the findings come from a file."]
    coefficients: NotRequired[Annotated[CoefficientMeans, "What coefficients leave of the matrix' delta; where some are given."]]

class CoefficientTotals(TypedDict):
    """Which coefficients were given, and their means over all matrices."""
    keep: Annotated[float, "Share of what the adapter learned that they were fitted to keep."]
    sha256: Annotated[Sha256, "Digest of the values of all matrices' coefficients (SHA-256, hexadecimal)."]
    mean: Annotated[Share | None, "Mean coefficient of the deltas' singular directions, weighted by the square of their singular values."]
    intruders_mean: Annotated[Share | None, "The same of the intruders, weighted by the energy on their left singular vectors; null if "
        "none."]

class TotalsRecord(TypedDict):
    """Sums over all matrices."""
    matrices: Annotated[Count, "Matrices."]
    intruders: Annotated[Count, "Intruders in all of them."]
    certified: Annotated[Count, "Matrices whose decisions are all certified."]
    escalated: Annotated[Count, "Matrices that the certified solver left to the dense one."]
    degenerate: Annotated[Count, "Matrices with directions in a cluster so tight that no single vector is defined."]
    looks_like_another_base: Annotated[bool | None, "In most matrices the leading direction is an intruder, one of several, that is no "
        "closer to the base than a random vector: the adapter was probably trained on another base. Null if it cannot be judged: that "
        "takes 8 matrices, each of enough dimensions that a random vector is clearly below threshold_epsilon."]
    seconds: Annotated[Amount | None, "Wall time in s that detection took, of the matrices that this run computed; null if there are none."]
    coefficients: NotRequired[Annotated[CoefficientTotals, "What coefficients leave of all matrices together; where some are given."]]

class FindingsRecord(TypedDict):
    """What `streamer detect --json` and `streamer report --json` print: the intruder dimensions of an adapter."""
    schema: Literal["streamer.findings/1"]
    base: Annotated[BaseSource, "The base model: its name, and what tells it from another, wherever it lies."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, in the same way."]
    options: Annotated[OptionsRecord, "What decided the findings."]
    totals: Annotated[TotalsRecord, "Sums over matrices."]
    matrices: Annotated[list[MatrixRecord], "One entry a matrix, in the base's file order."]
    output: NotRequired[Annotated[OutputPath, "Of detect only."]]
    state: NotRequired[Annotated[State, "Of detect only."]]
