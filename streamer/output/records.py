"""Types of the record of an output, ``streamer.json``, as JSON values; the stamp of its files is in `stamps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, NotRequired, TypedDict

from streamer.detection.findings_records import Ranks
from streamer.detection.selection import Selection
from streamer.detection.stamps import DetectionRecord
from streamer.json_types import Amount, Count, Keywords, ModuleName, OutputPath, Sha256, Share, State, TensorName
from streamer.methods import MethodName
from streamer.methods.fit_set import CoefficientsRecord
from streamer.methods.input_map import MapRecord
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.sources import AdapterSource, BaseSource

SCHEMA: Final = "streamer.output/2"


# fmt: off
class MitigatedMatrix(TypedDict):
    """What was done to one matrix."""
    tensor: TensorName
    module: ModuleName
    transposed: Annotated[bool, "Stored as (inputs, outputs) in the base; the output side was judged all the same."]
    intruders: Annotated[Ranks, "the intruders that were scaled."]
    certified: Annotated[bool | None, "Whether the decisions on it are certified; null where none were needed."]
    delta_norm: Annotated[Amount, "Frobenius norm of its delta."]
    delta_norm_after: Annotated[Amount, "The same of what was written."]
    dropped: Annotated[Amount, "Share of the mitigated delta's Frobenius norm that projection onto the written rank lost; 0 for a merge."]
    values: NotRequired[Annotated[Count, "Of a merge: the matrix's values, where one tensor of the base's dtype holds the sum; absent "
        "where it is stored quantized, in parts, or copied from a fine-tuned model."]]
    rounded_away: NotRequired[Annotated[Count, "Those of these values that rounding to the dtype left as in the base, under a delta that "
        "is not 0."]]
    coefficients: NotRequired[Annotated[list[Share], "Of the method fitted: what is left of each singular direction of the adapter's own "
        "delta, by falling singular value; one number where the delta has no factors."]]

class Totals(TypedDict):
    """Sums over matrices."""
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    intruders: Annotated[Count, "Intruders that were scaled."]
    changed: Annotated[Count, "Matrices whose delta differs from the adapter's."]
    delta_norm: Annotated[Amount, "Frobenius norm of the adapter's delta, of all matrices together."]
    delta_norm_after: Annotated[Amount, "The same of what was written."]
    equal_norm_shrink: Annotated[Amount, "The uniform factor on the whole adapter that gives the same norm: the baseline."]
    dropped_max: Annotated[Amount, "The largest `dropped` of a matrix."]
    values: NotRequired[Annotated[Count, "Sum of the `values` of all matrices; not in records of former versions."]]
    rounded_away: NotRequired[Annotated[Count, "Sum of the `rounded_away` of all matrices; not in records of former versions."]]
    bytes: Annotated[Count, "Bytes of all files but the record."]

class FileRecord(TypedDict):
    """A file of the output."""
    file: Annotated[str, "Name relative to the output."]
    bytes: Annotated[Count, "Its size in bytes."]
    sha256: Annotated[Sha256, "Its digest (SHA-256, hexadecimal)."]

# `lambda` is a keyword of the language, so this is no class.
Record = TypedDict("Record", {
    "schema": Literal["streamer.output/2"],
    "command": Annotated[str, Keywords(enum=["mitigate", "merge"]), "The command that made it."],
    "version": Annotated[str, "Version of streamer that made it."],
    "base": Annotated[BaseSource, "The base model: its name, and what tells it from another, wherever it lies."],
    "adapter": Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, in the same way."],
    "detection": Annotated[DetectionRecord | None, "How the intruders were found; null if none were needed (method shrink, lambda 1)."],
    "method": Annotated[MethodName, "How an intruder is scaled: the whole direction, only the adapter's part of it, or the whole "
        "adapter with no detection; fitted: each of the adapter's own directions by its coefficient; regmean: by new right factors; "
        "nullspace: by what it answers to general inputs."],
    "scale": Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."],
    "lambda": Annotated[float | None, "Share of an intruder that is kept: 1 changes nothing, 0 removes it; of the method "
        "nullspace, of the delta's energy on general inputs. Null of the methods fitted and regmean."],
    "coefficients": NotRequired[Annotated[CoefficientsRecord | None, "The set of coefficients (method fitted) or factors (regmean) "
        "that was applied; null of the others."]],
    "map": NotRequired[Annotated[MapRecord, "The map of the base's inputs, of the method nullspace; absent of the others."]],
    "to_lora": Annotated[float | None, Keywords(exclusiveMinimum=0), "Rank that --to-lora asked for, or share of the energy, or null."],
    "dequantize": Annotated[bool, "Whether a quantized base is written plain."],
    "totals": Annotated[Totals, "Sums over matrices."],
    "warnings": Annotated[list[str], "What may make the result differ from what was trained or asked for, a line each."],
    "notes": Annotated[list[str], "What else happened, a line each."],
    "advice": Annotated[list[str], "What would be better, a line each."],
    "measured": NotRequired[Annotated[list[str], "What `streamer repair` measured of it, a line each."]],
    "left_out": Annotated[list[str], "Files beside the input that were not taken along: weights in other formats, training state."],
    "carried": Annotated[list[CarriedRecord], "Tensors of the adapter that are no factors; of a fine-tuned model those that differ from "
        "the base."],
    "tokenizer": NotRequired[Annotated[Literal["adapter", "base"] | None, "Whose tokenizer a merged directory has; null if none."]],
    "matrices": Annotated[list[MitigatedMatrix], "One entry a matrix, in the order of writing."],
})
Record.__doc__ = "The record of an output, without its files."

class Written(Record):
    """The record of an output, a mitigated adapter or a merged model: its `streamer.json`; `--json` prints it with `output` and `state`."""
    plan: Annotated[Sha256, "Digest of all that decides the output's bytes, but for last bits of given findings (SHA-256, hexadecimal)."]
    files: Annotated[list[FileRecord], "The output's files but the record, in the order of writing; the last one makes it loadable."]
    sha256: NotRequired[Annotated[Sha256, "Digest of `streamer.json` with 64 zeros in its place (SHA-256, hexadecimal); from 0.2 on."]]
    output: NotRequired[Annotated[OutputPath, "Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
# fmt: on


def certified_count(matrices: Sequence[MitigatedMatrix]) -> int:
    """Count the matrices with certified decisions."""
    return sum(m["certified"] is True for m in matrices)
