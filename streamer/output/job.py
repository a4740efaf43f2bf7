"""Describe one mitigation of an adapter's deltas: the plan, the options, and the findings.

Define the JSON types of an output's record, ``streamer.json``; its files' stamp is in `stamps`.

Measure a mitigation: the metrics of a matrix, as in an output's journal and record, and their totals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

import torch

from streamer.adapters.rules import mitigated_before
from streamer.detection.detect import FindingsSize, findings_bytes
from streamer.detection.findings import Findings
from streamer.detection.intruders import Detection
from streamer.detection.options import RANKS, STAMP, DetectionOptions, DetectionRecord, detection_record, stamp
from streamer.errors import NumericError
from streamer.json_types import Amount, Count, Keywords, ModuleName, OutputPath, Selection, Sha256, State, TensorName
from streamer.linalg.operators import Delta, all_finite
from streamer.methods import Method, MethodName
from streamer.methods.files import CoefficientsRecord, MapRecord
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.plan import Plan, factor_bytes
from streamer.plan.sources import AdapterSource, BaseSource
from streamer.plan.targets import Target

SCHEMA: Final = "streamer.output/2"


# fmt: off
class MitigatedMatrix(TypedDict):
    """The mitigation of one matrix."""
    tensor: TensorName
    module: ModuleName
    transposed: Annotated[bool, "Whether the base stores it as (inputs, outputs); decisions still use the output side."]
    intruders: Annotated[list[Count], RANKS, "the intruders that were scaled."]
    certified: Annotated[bool | None, "Whether its decisions are certified; null if none were needed."]
    delta_norm: Annotated[Amount, "Frobenius norm of the matrix's delta."]
    delta_norm_after: Annotated[Amount, "The same for what was written."]
    dropped: Annotated[Amount, "Share of the mitigated delta's Frobenius norm lost in projection onto the written rank; 0 for a merge."]
    values: NotRequired[Annotated[Count, "For a merge: values of the matrix, if one tensor of the base's dtype holds it, not a copy."]]
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
    "coefficients": NotRequired[Annotated[CoefficientsRecord | None, "The fit's factors; null except with method regmean."]],
    "map": NotRequired[Annotated[MapRecord, "The map of the base's inputs; only with method nullspace."]],
    "file": NotRequired[Annotated[str, "Name of the file of coefficients or map, if there is one; else `coefficients` or `map`."]],
    "to_lora": Annotated[float | None, Keywords(exclusiveMinimum=0), "Rank or share of the energy given with --to-lora, or null."],
    "dequantize": Annotated[bool, "Whether a quantized base is written as a plain one."],
    "totals": Annotated[Totals, "Totals over all matrices."],
    "warnings": Annotated[list[str], "What may make the result differ from what was trained or requested, one line each."],
    "notes": Annotated[list[str], "What else happened, one line each."],
    "advice": Annotated[list[str], "What would be better, one line each."],
    "measured": NotRequired[Annotated[list[str], "What `streamer repair` measured, one line each."]],
    "left_out": Annotated[list[str], "Files beside the input that were not copied: weights in other formats, training state."],
    "carried": Annotated[list[CarriedRecord], "Tensors of the adapter other than factors; of a fine-tuned model, those that differ."],
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


MOST_LOST = 0.01
"""Largest share of a mitigated delta's Frobenius norm that may be lost without a warning."""


def matrix_metrics(
    target: Target, delta: Delta, after: Delta, found: Detection | None, method: Method, truncation_error: float = 0.0
) -> MitigatedMatrix:
    """Measure the mitigation of one matrix, as JSON values.

    Parameters
    ----------
    after
        Δ' as written.
    method
        The method of the mitigation.
    truncation_error
        ``‖Δ' − written‖_F / ‖Δ'‖_F``.
    """
    before = delta.norm()
    scaled = () if found is None else found.intruders if method.select == "all" else found.intruders[:1]
    return {"tensor": target.tensor, "module": target.module.name, "transposed": target.transposed, "intruders": list(scaled),
            "certified": None if found is None else found.certified, "delta_norm": before,
            "delta_norm_after": before if after is delta else after.norm(), "dropped": truncation_error}  # fmt: skip


def totals(matrices: list[MitigatedMatrix], nbytes: int) -> Totals:
    """Sum the metrics of all matrices of an output of `nbytes` bytes."""
    before = math.sqrt(sum(m["delta_norm"] ** 2 for m in matrices))
    after = math.sqrt(sum(m["delta_norm_after"] ** 2 for m in matrices))
    return {"matrices": len(matrices), "intruders": sum(len(m["intruders"]) for m in matrices),
            "changed": sum(m["delta_norm_after"] != m["delta_norm"] for m in matrices),
            "delta_norm": before, "delta_norm_after": after, "equal_norm_shrink": after / before if before > 0 else 1.0,
            "dropped_max": max((m["dropped"] for m in matrices), default=0.0), "values": sum(m.get("values", 0) for m in matrices),
            "rounded_away": sum(m.get("rounded_away", 0) for m in matrices), "bytes": nbytes}  # fmt: skip


def truncation_warnings(matrices: Sequence[MitigatedMatrix], remedy: Callable[[], str]) -> list[str]:
    """Report how many matrices lose more than `MOST_LOST`, and which loses most; return an empty list if none does.

    Parameters
    ----------
    remedy
        Describes what to do instead.
    """
    lost = [m for m in matrices if m["dropped"] > MOST_LOST]
    if not lost:
        return []
    worst = max(lost, key=lambda m: m["dropped"])
    return [
        f"lost in projection: more than {100 * MOST_LOST:g} % of the delta in {len(lost)} of "
        f"{len(matrices)} matrices, most in {worst['tensor']!r} ({100 * worst['dropped']:.2f} %); {remedy()}"
    ]


THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, the factors of its inputs, and their thin QRs."""

PROJECTED = 80
"""Bytes if it is also projected onto a rank."""


@dataclass(frozen=True)
class Job:
    """One mitigation, ready to run.

    Attributes
    ----------
    detection
        Options for detection if no findings are given, and the allowed memory of the run.
    findings
        Findings; None if the run makes them first, in its own file. Used only if the method needs them.
    dequantize
        Whether a merged model of a quantized base is written as a plain one.
    card
        Whether the output's ``README.md`` describes how it was made.
    measured
        Measurements, one line each, for the record and the card.
    detect
        Makes the findings of one matrix if they are made together with its tensors, and no file of them.
    """

    plan: Plan
    method: Method
    detection: DetectionOptions
    device: torch.device
    findings: Findings | None = None
    dequantize: bool = False
    card: bool = True
    measured: tuple[str, ...] = ()
    detect: Callable[[Target], Detection] | None = None

    @cached_property
    def findings_size(self) -> FindingsSize:
        """Compute the size of the findings that the job makes; see `findings_bytes`."""
        return findings_bytes(self.plan, self.detection)

    @property
    def detects(self) -> bool:
        """Test whether the job makes its own findings."""
        return self.method.needs_detection and self.findings is None

    @property
    def warnings(self) -> list[str]:
        """Warn of an adapter whose intruders were already scaled."""
        if self.method.mitigation_lambda == 1:
            return []
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """Return the largest number of directions that Δ' adds."""
        if self.detects:
            return self.detection.directions(target.module.shape)
        return len(self._found(target).intruders) if self.method.needs_detection else 0

    def mitigation_bytes(self, target: Target, projected: bool = False) -> int:
        """Estimate the memory for Δ, Δ' and the norms of one matrix, in addition to resident memory.

        Parameters
        ----------
        projected
            Whether Δ' is projected onto the adapter's rank.
        """
        module, itemsize = target.module, self.plan.weights[target.tensor].compute.itemsize
        m, n = module.shape
        if module.low_rank:
            size = (PROJECTED if projected else THIN) * (m + n) * (module.factor_rank + self.intruders(target))
        else:
            # Δ, Δ', and one more if Δ is scaled.
            size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
        return size + factor_bytes(self.plan, target, itemsize)

    def mitigated(self, target: Target) -> tuple[Delta, Delta, Detection | None]:
        """Return Δ, Δ' and the findings of one matrix: Δ twice if nothing changes, None if no findings are needed."""
        delta = self.plan.finite_delta(target)
        found = self._found(target) if self.method.needs_detection else None
        if found is not None and not (all_finite(found.U) and all_finite(found.Vh)):
            raise NumericError(f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again")
        return delta, self.method.mitigated(delta, found, target.tensor), found

    def _found(self, target: Target) -> Detection:
        if self.detect is not None:
            return self.detect(target)
        assert self.findings is not None, "the findings are yet to be made"
        return self.findings.by_tensor[target.tensor].detection

    def decisions(self) -> dict[str, Any]:
        """Return everything besides the inputs that determines the output's bytes, except last bits of given findings."""
        detection = self.detection.as_dict() if self.findings is None else self.findings.decisions_digest()
        return {"schema": SCHEMA, "mitigation": self.method.as_dict(),
                "detection": detection if self.method.needs_detection else None, "dequantize": self.dequantize, "card": self.card,
                **({"measured": list(self.measured)} if self.measured else {})}  # fmt: skip

    @property
    def bits(self) -> str:
        """Return the digest of the last bits of given findings, which depend on the number of threads, if the output's bytes need them."""
        return self.findings.digest() if self.findings is not None and self.method.needs_detection else ""

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """Return how intruders are found; None if the method does not need them."""
        if not self.method.needs_detection:
            return None
        options = self.detection if self.findings is None else self.findings.options
        return detection_record(options, certified, len(self.plan.targets))

    def stamp(self, command: str, written: Sequence[Target] | None = None) -> dict[str, str]:
        """Return the stamp for the metadata of the output's files, or the longest possible one before the findings exist.

        `written` are the matrices in the output; by default all.
        """
        targets = self.plan.targets if written is None else written
        needed = self.method.needs_detection
        certified = sum(self.findings is None or self._found(t).certified for t in targets) if needed else 0
        return {STAMP: stamp(command, *self.plan.sources, self.detection_record(certified), self.method.as_json())}
