"""Hold the subject of a report: findings, an evaluation, or both, or the record of an output.

Compute a report's curves from findings: number of intruders by threshold, and the norm that each λ removes.

Pack whole numbers and tensor names into short texts for a page's script, so that 36,000 matrices fit into 5 MB.

A number is written with base64's digits, most significant first; all numbers of a column have the same number of digits. Similarities use
two digits, steps of 1/4095, which is finer than a screen shows.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import SCHEMA as FINDINGS_SCHEMA
from streamer.detection.options import FindingsRecord
from streamer.errors import FormatError, MismatchError, UsageError
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.losses import EvaluationRecord
from streamer.json_types import Count, ReportFile
from streamer.measuring.result_file import same_input
from streamer.methods import takes_findings
from streamer.output.job import Written
from streamer.storage.tensor_file import TensorFile
from streamer.units import counted
from streamer.verification.tensors import RECORD_NAME
from streamer.verification.verify import read_statement

LAMBDAS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
"""Values of λ for which a report shows the norm removed."""

THRESHOLDS = tuple(i / 50 for i in range(1, 51))
"""Thresholds ε at which to count intruders, in addition to the findings' own."""


# fmt: off
class ThresholdRecord(TypedDict):
    """A threshold, and bounds on the number of directions below it: at least `least`, at most `most`."""
    epsilon: Annotated[float, "The threshold."]
    intruders: Annotated[Count, "Directions whose similarity, as used for the decision, is below the threshold, over all matrices."]
    least: Annotated[Count, "Directions whose interval lies below the threshold."]
    most: Annotated[Count, "Directions whose interval begins below the threshold."]

# `lambda` is a Python keyword, so this cannot be a class.
LambdaRecord = TypedDict("LambdaRecord", {
    "lambda": Annotated[float, "Share of an intruder to keep."],
    "paper": Annotated[float, "Norm that --method paper removes, as a share of the delta's; above 1 if much of it belongs to the base."],
    "project": Annotated[float, "The same for --method project."],
    "norm_left": Annotated[float, "Norm of the delta that project leaves, as a share: lambda of the shrink with the same norm."],
})
LambdaRecord.__doc__ = """What a λ removes, over all matrices.

``paper``: ``‖Δ' − Δ‖ / ‖Δ‖ = (1 − λ) ‖Σ_I‖ / ‖Δ‖``; ``project``: ``(1 − λ) √e``, with the intruders' share e of the delta's energy;
``norm_left``: ``√(1 − (1 − λ²) e)``.
"""
# fmt: on


def delta_energy(findings: Findings) -> tuple[float, float]:
    """Sum ``‖Δ‖²`` over all matrices, and compute the intruders' share of it."""
    norms = [m.detection.delta_norm**2 for m in findings]
    taken = [m.detection.delta_norm**2 * m.detection.intruder_energy for m in findings]
    total = math.fsum(norms)
    return total, math.fsum(taken) / total if total > 0 else 0.0


def threshold_curve(findings: Findings) -> list[ThresholdRecord]:
    """Count the directions below each threshold, in rising order; the findings' own threshold is included."""
    names = ("similarity", "similarity_low", "similarity_high")
    columns: list[NDArray[np.float64]] = [
        np.sort(np.fromiter(chain.from_iterable(getattr(m.detection, name) for m in findings), np.float64))
        for name in names
    ]
    out: list[ThresholdRecord] = []
    for epsilon in sorted({*THRESHOLDS, findings.options.threshold_epsilon}):
        taken, most, least = (int(np.searchsorted(values, epsilon)) for values in columns)
        out.append({"epsilon": epsilon, "intruders": taken, "least": least, "most": most})
    return out


def lambda_curve(findings: Findings) -> list[LambdaRecord]:
    """Compute what each λ removes."""
    total, share = delta_energy(findings)
    intruding = math.fsum(m.detection.singular_values[j] ** 2 for m in findings for j in m.detection.intruders)
    paper, project = math.sqrt(intruding / total) if total > 0 else 0.0, math.sqrt(share)
    return [
        {"lambda": lam, "paper": (1 - lam) * paper, "project": (1 - lam) * project,
         "norm_left": math.sqrt(max(0.0, 1 - (1 - lam * lam) * share))}
        for lam in LAMBDAS
    ]  # fmt: skip


DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Digits of base 64, 0 first."""

NUMBER = re.compile(r"(?<![^.\[])\d+(?![^.\]])")
"""A number that is a whole part of a name, such as a layer's or an expert's."""

LONGEST = 15
"""Most decimal digits of a number that JavaScript represents exactly."""


class Packed(TypedDict):
    """Column of whole numbers: digits of each number, and all numbers concatenated."""

    digits: int
    codes: str


def pack(values: ArrayLike, digits: int | None = None) -> Packed:
    """Write nonnegative whole numbers in base 64.

    Parameters
    ----------
    values
        Numbers of any shape, below ``64^digits``.
    digits
        Digits of each number; by default as many as the largest needs.

    >>> pack([0, 1, 63])
    {'digits': 1, 'codes': 'AB/'}
    >>> pack([64, 4095])
    {'digits': 2, 'codes': 'BA//'}
    """
    numbers = np.asarray(values, np.int64).ravel()
    most = int(numbers.max(initial=0))
    width = digits or max(1, -(-most.bit_length() // 6))
    if most >= 64**width or numbers.min(initial=0) < 0:
        raise ValueError(f"{width} digits do not hold {most}")
    shifts = 6 * np.arange(width - 1, -1, -1)
    table = np.frombuffer(DIGITS, np.uint8)
    return {"digits": width, "codes": table[(numbers[:, None] >> shifts) & 63].tobytes().decode("ascii")}


def pack_share(values: NDArray[np.float64], digits: int, up: bool = False) -> Packed:
    """Write shares from 0 to 1 in steps of ``1 / (64^digits - 1)``, rounded down or `up`, so that intervals stay valid."""
    steps = np.clip(values, 0.0, 1.0) * (64**digits - 1)
    return pack(np.ceil(steps) if up else np.floor(steps), digits)


def pack_ratio(values: NDArray[np.float64], digits: int, least: float) -> Packed:
    """Write ratios from `least` to 1 by their logarithms: code 0 is ratio 1, the largest code is `least` or less."""
    steps = np.log(np.clip(values, least, 1.0)) / np.log(least) * (64**digits - 1)
    return pack(np.rint(steps), digits)


def pack_names(names: Sequence[str]) -> dict[str, Any]:
    """Write names as forms and numbers; a name that this would not reproduce is stored whole after an equals sign.

    >>> pack_names(["layers.0.q.weight", "layers.1.q.weight"])
    {'forms': ['layers.*.q.weight'], 'form': {'digits': 1, 'codes': 'AA'}, 'numbers': [0, 1]}
    """
    forms: dict[str, int] = {}
    form: list[int] = []
    numbers: list[int] = []
    for name in names:
        found = NUMBER.findall(name)
        plain = "*" not in name and name[:1] != "=" and all(len(n) <= LONGEST and str(int(n)) == n for n in found)
        form.append(forms.setdefault(NUMBER.sub("*", name) if plain else f"={name}", len(forms)))
        numbers += map(int, found) if plain else ()
    return {"forms": list(forms), "form": pack(form), "numbers": numbers}


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
