"""Hold the subject of a report: findings, an evaluation, or both, or the record of an output."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import SCHEMA as FINDINGS_SCHEMA
from streamer.detection.findings_records import FindingsRecord
from streamer.errors import FormatError, MismatchError, UsageError
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.evaluation_records import EvaluationRecord
from streamer.json_types import ReportFile
from streamer.measuring.identity import same_input
from streamer.methods import takes_findings
from streamer.output.records import Written
from streamer.report.curves import LambdaRecord, ThresholdRecord, lambda_curve, threshold_curve
from streamer.storage.tensor_file import TensorFile
from streamer.units import counted
from streamer.verification.result import RECORD_NAME
from streamer.verification.verify import read_statement

SCHEMA: Final = "streamer.report/1"


# fmt: off
class ReportRecord(TypedDict):
    """What `streamer report --json` prints with an evaluation or with -o: the data of the page."""
    schema: Literal["streamer.report/1"]
    findings: Annotated[FindingsRecord | None, "The findings, streamer.findings/1; null for an output or an evaluation alone."]
    evaluation: Annotated[EvaluationRecord | None, "The evaluation, streamer.evaluation/1; null without one."]
    record: Annotated[Written | None, "The record of an output, streamer.output/2; null for findings."]
    thresholds: Annotated[list[ThresholdRecord], "Number of directions below each threshold, in rising order; empty without findings."]
    lambdas: Annotated[list[LambdaRecord], "What each lambda removes, over all matrices; empty without findings."]
    output: NotRequired[Annotated[str, "Path of the page or directory, as given. Only with -o."]]
    state: NotRequired[Annotated[Literal["written", "present"], "Whether the run wrote the files, or found the same bytes. Only with -o."]]
    files: NotRequired[Annotated[list[ReportFile], "The files of the report. Only with -o."]]
# fmt: on


@dataclass(frozen=True)
class Subject:
    """Subject of a report.

    Attributes
    ----------
    findings
        Findings; None for a report on an output, or on an evaluation alone.
    evaluation
        Evaluation of the same base and adapter, if given.
    record
        The record of an output, ``streamer.json``; None for a report on findings.
    """

    findings: Findings | None
    evaluation: Evaluation | None = None
    record: Mapping[str, Any] | None = None

    @property
    def found(self) -> Findings:
        """Return the findings; the report must be on findings."""
        assert self.findings is not None
        return self.findings

    def to_dict(self) -> ReportRecord:
        """Return the JSON object (schema ``streamer.report/1``), which contains everything that is drawn."""
        findings, evaluation = self.findings, self.evaluation
        return {"schema": SCHEMA, "findings": None if findings is None else findings.record(),
                "evaluation": None if evaluation is None else evaluation.to_dict(),
                "record": None if self.record is None else cast(Written, dict(self.record)),
                "thresholds": [] if findings is None else threshold_curve(findings),
                "lambdas": [] if findings is None else lambda_curve(findings)}  # fmt: skip


@dataclass(frozen=True)
class Collection:
    """Findings on several adapters, by file name, as `detect` writes them into a directory."""

    findings: Mapping[str, Findings]


def open_subject(path: str | Path, evaluation: str | Path | None = None) -> Subject | Collection:
    """Read the subject of a report.

    Parameters
    ----------
    path
        Findings, a directory of findings, an evaluation, or an output's directory with ``streamer.json``.
    evaluation
        File from ``streamer evaluate`` for the same base and adapter.

    Raises
    ------
    InputError
        If one of them is something else, or they do not belong together.
    UsageError
        If an evaluation is given with an output, a directory of findings, or another evaluation.
    """
    path = Path(path)
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        is_evaluation = b'"streamer.evaluation/' in file.read(200)
    if is_evaluation:
        if evaluation is not None:
            raise UsageError(
                f"{path}: is an evaluation, as is the second argument; give its findings first, or one evaluation alone"
            )
        return Subject(None, load_evaluation(path))
    if path.is_dir() and (path / RECORD_NAME).exists():
        if evaluation is not None:
            raise UsageError(f"{path}: is an output, and an evaluation is shown with findings; name the findings file")
        record = read_statement(path)
        if isinstance(record, str):
            raise FormatError(
                f"{path / RECORD_NAME}: {record}; `streamer verify` gives details; the output's command writes it again"
            )
        return Subject(None, record=record)
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if found := [file for file in files if TensorFile(file).header.metadata.get("schema") == FINDINGS_SCHEMA]:
        if evaluation is not None:
            raise UsageError(
                f"{path}: holds findings on {counted(len(found), 'adapter')}, but an evaluation covers one; name its findings, such as "
                f"{found[0]}"
            )
        return Collection({one.stem: make_subject(load_findings(one), where=one).found for one in found})
    findings = load_findings(path)
    return make_subject(findings, None if evaluation is None else load_evaluation(evaluation), path)


def make_subject(
    findings: Findings, evaluation: Evaluation | None = None, where: str | Path = "the findings"
) -> Subject:
    """Combine findings and an evaluation after checking them.

    Parameters
    ----------
    where
        Name of the findings in messages.

    Raises
    ------
    FormatError
        If a number in the findings is not finite.
    MismatchError
        If the evaluation is of another base or adapter, or the findings are on a model in memory.
    """
    for m in findings:
        d = m.detection
        numbers = d.delta_norm, d.intruder_energy, d.dropped_at_zero, d.cutoff, m.scale
        arrays = d.singular_values, d.similarity, d.similarity_low, d.similarity_high, d.base_singular_values
        if not all(map(math.isfinite, chain(numbers, *arrays))):
            raise FormatError(f"{where}: a figure of {m.tensor} is NaN or Inf; run detect again")
    if evaluation is not None and findings.base.get("in_memory"):
        raise MismatchError(
            f"{where}: made on a model in memory, and the evaluation on files, so it is unknown whether they belong together; "
            "run detect on the files, or report without an evaluation"
        )
    if evaluation is not None:
        for what, mine in (("base", findings.base), ("adapter", findings.adapter)):
            theirs = evaluation.facts[what]
            if not same_input(mine, theirs):
                raise MismatchError(
                    f"{where}: the evaluation is of another {what} ({theirs.get('name', 'unnamed')!r}); "
                    "run evaluate with these findings, or report without an evaluation"
                )
    return Subject(findings, evaluation)


def scales_intruders(record: Mapping[str, Any]) -> bool:
    """Test whether an output was made by scaling intruders; a shrink scales whole deltas, coefficients scale each direction."""
    return takes_findings(record["method"])
