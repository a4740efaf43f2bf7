"""Types of the record of an output, ``streamer.json``, as JSON values; the stamp of its files is in `stamps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from streamer.detection.stamps import DetectionRecord
from streamer.events import OutputState
from streamer.output.coefficients import CoefficientsRecord
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.sources import Source

SCHEMA = "streamer.output/2"


class MitigatedMatrix(TypedDict):
    """Metrics of the mitigation of one matrix.

    Attributes
    ----------
    transposed
        Whether the base stores (in, out); the output side was judged all the same.
    intruders
        0-based ranks of those that were scaled.
    certified
        Whether the decisions on it are certified; None where none were needed.
    dropped
        ``‖Δ' − written‖_F / ‖Δ'‖_F``: what the rank of the adapter that was written leaves out; 0 for a merge.
    coefficients
        What is left of each direction of Δ, by falling singular value, or of a dense Δ as a whole; of the method ``fitted`` alone.
    values, rounded_away
        Values of a matrix that a merge sums in one tensor, in the base's dtype, and how many of them kept the base's bytes although Δ' is
        not zero.
    """

    tensor: str
    module: str
    transposed: bool
    intruders: list[int]
    certified: bool | None
    delta_norm: float
    delta_norm_after: float
    dropped: float
    coefficients: NotRequired[list[float]]
    values: NotRequired[int]
    rounded_away: NotRequired[int]


class Totals(TypedDict):
    """Sums over matrices; `equal_norm_shrink` is the uniform factor on the whole adapter that gives the same total norm."""

    matrices: int
    intruders: int
    changed: int
    delta_norm: float
    delta_norm_after: float
    equal_norm_shrink: float
    dropped_max: float
    values: int
    rounded_away: int
    bytes: int


class FileRecord(TypedDict):
    """A file of the output."""

    file: str
    bytes: int
    sha256: str


# `lambda` is a keyword of the language, so these two are not classes.
Record = TypedDict(
    "Record",
    {
        "schema": str,
        "command": str,
        "version": str,
        "base": Source,
        "adapter": Source,
        "detection": DetectionRecord | None,
        "method": str,
        "scale": str,
        "lambda": float | None,
        "coefficients": CoefficientsRecord | None,
        "to_lora": int | float | None,
        "dequantize": bool,
        "totals": Totals,
        "warnings": list[str],
        "notes": list[str],
        "advice": list[str],
        "left_out": list[str],
        "carried": list[CarriedRecord],
        "tokenizer": Literal["adapter", "base"] | None,
        "matrices": list[MitigatedMatrix],
        "plan": str,
        "files": list[FileRecord],
        "sha256": str,
    },
    total=False,
)
Record.__doc__ = """The record of an output, as it stands in ``streamer.json``.

`warnings` say where the result may differ from what was trained, `notes` what else happened, and `advice` what would be better, a line
each. `plan` is a digest over all that decides the output's bytes, `sha256` one of the record's own, with zeros in its place.
"""


class Written(Record, total=False):
    """A record, with where the output stands, and whether this run wrote it, took up an interrupted run, or found it finished."""

    output: str
    state: OutputState


def certified_count(matrices: Sequence[MitigatedMatrix]) -> int:
    """Count the matrices with certified decisions."""
    return sum(m["certified"] is True for m in matrices)
