"""Define the JSON types of an output's record, ``streamer.json``; its files' stamp is in `stamps`."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NotRequired, TypedDict

from streamer.detection.findings_records import Ranks
from streamer.detection.selection import Selection
from streamer.detection.stamps import DetectionRecord
from streamer.json_types import Amount, Count, Keywords, ModuleName, OutputPath, Sha256, State, TensorName
from streamer.methods import MethodName
from streamer.methods.fits import CoefficientsRecord
from streamer.methods.maps import MapRecord
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.sources import AdapterSource, BaseSource

SCHEMA: Final = "streamer.output/2"


# fmt: off
class MitigatedMatrix(TypedDict):
    """The mitigation of one matrix."""
    tensor: TensorName
    module: ModuleName
    transposed: Annotated[bool, "Whether the base stores it as (inputs, outputs); decisions still use the output side."]
    intruders: Annotated[Ranks, "the intruders that were scaled."]
    certified: Annotated[bool | None, "Whether its decisions are certified; null if none were needed."]
    delta_norm: Annotated[Amount, "Frobenius norm of the matrix's delta."]
    delta_norm_after: Annotated[Amount, "The same for what was written."]
    dropped: Annotated[Amount, "Share of the mitigated delta's Frobenius norm lost in projection onto the written rank; 0 for a merge."]
    values: NotRequired[Annotated[Count, "For a merge: number of values of the matrix, if one tensor of the base's dtype holds the sum; "
        "absent if it is stored quantized, in parts, or copied from a fine-tuned model."]]
    rounded_away: NotRequired[Annotated[Count, "How many of them rounding to the dtype left as in the base although the delta is not 0."]]

class Totals(TypedDict):
    """Totals over all matrices."""
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    intruders: Annotated[Count, "Intruders that were scaled."]
    changed: Annotated[Count, "Matrices whose delta differs from the adapter's."]
    delta_norm: Annotated[Amount, "Frobenius norm of the adapter's delta over all matrices."]
    delta_norm_after: Annotated[Amount, "The same for what was written."]
    equal_norm_shrink: Annotated[Amount, "Lambda of the shrink of the whole adapter with the same norm: the baseline."]
    dropped_max: Annotated[Amount, "The largest `dropped` of a matrix."]
    values: NotRequired[Annotated[Count, "Sum of the `values` of all matrices; absent in earlier versions."]]
    rounded_away: NotRequired[Annotated[Count, "Sum of the `rounded_away` of all matrices; absent in earlier versions."]]
    bytes: Annotated[Count, "Bytes of all files except the record."]

class FileRecord(TypedDict):
    """A file of the output."""
    file: Annotated[str, "Name, relative to the output."]
    bytes: Annotated[Count, "Its size in bytes."]
    sha256: Annotated[Sha256, "Its digest (SHA-256, hexadecimal)."]

# `lambda` is a keyword of the language, so this cannot be a class.
Record = TypedDict("Record", {
    "schema": Literal["streamer.output/2"],
    "command": Annotated[str, Keywords(enum=["mitigate", "merge"]), "The command that made it."],
    "version": Annotated[str, "Version of streamer that made it."],
    "base": Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."],
    "adapter": Annotated[AdapterSource, "The adapter, or the fine-tuned model used as one, described in the same way."],
    "detection": Annotated[DetectionRecord | None, "How the intruders were found; null if none were needed (method shrink, or lambda 1)."],
    "method": Annotated[MethodName, "What is scaled: paper: the whole intruder; project: only the adapter's part of it; shrink: the whole "
        "adapter, without detection. regmean replaces the right factors; nullspace reduces the response to general inputs."],
    "scale": Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."],
    "lambda": Annotated[float | None, "Share of an intruder to keep: 1 changes nothing, 0 removes it (project keeps the base's part); with "
        "method nullspace, share of the delta's energy on general inputs. Null with method regmean."],
    "coefficients": NotRequired[Annotated[CoefficientsRecord | None, "The factors of a fit that were applied; null with methods other "
        "than regmean."]],
    "map": NotRequired[Annotated[MapRecord, "The map of the base's inputs; only with method nullspace."]],
    "file": NotRequired[Annotated[str, "Name of the file of the coefficients or map, without its directory; only if the method needs one. "
        "For an object in memory, the word coefficients or map."]],
    "to_lora": Annotated[float | None, Keywords(exclusiveMinimum=0), "Rank or share of the energy given with --to-lora, or null."],
    "dequantize": Annotated[bool, "Whether a quantized base is written as a plain one."],
    "totals": Annotated[Totals, "Totals over all matrices."],
    "warnings": Annotated[list[str], "What may make the result differ from what was trained or requested, one line each."],
    "notes": Annotated[list[str], "What else happened, one line each."],
    "advice": Annotated[list[str], "What would be better, one line each."],
    "measured": NotRequired[Annotated[list[str], "What `streamer repair` measured, one line each."]],
    "left_out": Annotated[list[str], "Files beside the input that were not copied: weights in other formats, training state."],
    "carried": Annotated[list[CarriedRecord], "Tensors of the adapter that are not factors; for a fine-tuned model, those that differ from "
        "the base."],
    "tokenizer": NotRequired[Annotated[Literal["adapter", "base"] | None, "Whose tokenizer a merged directory has; null if none."]],
    "matrices": Annotated[list[MitigatedMatrix], "One entry per matrix, in the order of writing."],
})
Record.__doc__ = "The record of an output, without its files."

class Written(Record):
    """The record of an output, a mitigated adapter or a merged model: its `streamer.json`; `--json` prints it with `output` and `state`."""
    plan: Annotated[Sha256, "Digest of what decides the output's bytes, except last bits of given findings (SHA-256, hexadecimal)."]
    files: Annotated[list[FileRecord], "The output's files without the record, in the order of writing; the last one makes it loadable."]
    sha256: NotRequired[Annotated[Sha256, "Digest of `streamer.json` with 64 zeros in its place (SHA-256, hexadecimal); since 0.2."]]
    output: NotRequired[Annotated[OutputPath, "Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
# fmt: on
