"""Make a report's page: one HTML file that contains its style, script and data, and loads nothing.

The subject of a report is findings, an evaluation, or both, or the record of an output. Its curves are computed from findings: the number
of intruders by threshold, and the norm that each λ removes.

Whole numbers and tensor names are packed into short texts for the page's script, so that 36,000 matrices fit into 5 MB. A number is written
with base64's digits, most significant first; all numbers of a column have the same number of digits. Similarities use two digits, steps of
1/4095, which is finer than a screen shows.

Sentences describe what was asked and found, how far it is proven, and what an evaluation suggests.

The page is written atomically, and replaces nothing but reports.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from operator import getitem
from pathlib import Path
from string import Template
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamer.detection.findings import SCHEMA as FINDINGS_SCHEMA
from streamer.detection.findings import Findings, FindingsRecord, load_findings
from streamer.errors import FormatError, MismatchError, OutputError, UsageError, printable
from streamer.evaluation.evaluation import (
    Evaluation,
    EvaluationRecord,
    commands,
    field_figures,
    figures,
    load_evaluation,
    reasons,
    verdict,
)
from streamer.json_types import Count, ReportFile
from streamer.measuring.runs import same_input
from streamer.methods import METHODS, takes_findings
from streamer.output.job import Written, record_lines, verify_line
from streamer.plan.name_matching import natural
from streamer.storage.atomic_file import remove_partials, write_atomic
from streamer.storage.checkpoint import TensorFile
from streamer.storage.files import locked, make_directory, storage_errors, touch
from streamer.storage.transaction import (
    check_file_path,
    check_space,
    holds,
    is_taken,
    lock_of,
    not_own,
    refuse_symlink,
    refuse_within_output,
)
from streamer.units import counted, listed
from streamer.verification.verify import RECORD_NAME, read_statement

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
    columns = []
    for name in ("similarity", "similarity_low", "similarity_high"):
        values = chain.from_iterable(getattr(m.detection, name) for m in findings)
        columns.append(np.sort(np.fromiter(values, np.float64)))
    out: list[ThresholdRecord] = []
    for epsilon in sorted({*THRESHOLDS, findings.options.threshold_epsilon}):
        taken, most, least = (int(np.searchsorted(column, epsilon)) for column in columns)
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
    stems: list[str] = []
    numbers: list[int] = []
    for name in names:
        found = NUMBER.findall(name)
        plain = "*" not in name and name[:1] != "=" and all(len(n) <= LONGEST and str(int(n)) == n for n in found)
        stems.append(NUMBER.sub("*", name) if plain else f"={name}")
        numbers += map(int, found) if plain else ()
    forms, form = _numbered(stems)
    return {"forms": forms, "form": form, "numbers": numbers}


def _numbered(texts: Iterable[str]) -> tuple[list[str], Packed]:
    """List the different texts, and write for each text its place in that list."""
    places: dict[str, int] = {}
    column = [places.setdefault(text, len(places)) for text in texts]
    return [*places], pack(column)


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
    several
        Findings on several adapters, by file name, as `detect` writes them into a directory; there is nothing else then.
    """

    findings: Findings | None
    evaluation: Evaluation | None = None
    record: Mapping[str, Any] | None = None
    several: Mapping[str, Findings] | None = None

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


def open_subject(path: str | Path, evaluation: str | Path | None = None) -> Subject:
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

    def refuse_evaluation(why: str) -> None:
        if evaluation is not None:
            raise UsageError(f"{path}: {why}")

    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        is_evaluation = b'"streamer.evaluation/' in file.read(200)
    if is_evaluation:
        refuse_evaluation(
            "is an evaluation, as is the second argument; give its findings first, or one evaluation alone"
        )
        return Subject(None, load_evaluation(path))
    if path.is_dir() and (path / RECORD_NAME).exists():
        refuse_evaluation("is an output, and an evaluation is shown with findings; name the findings file")
        record = read_statement(path)
        if isinstance(record, str):
            raise FormatError(
                f"{path / RECORD_NAME}: {record}; `streamer verify` gives details; the output's command writes it again"
            )
        return Subject(None, record=record)
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if found := [file for file in files if TensorFile(file).header.metadata.get("schema") == FINDINGS_SCHEMA]:
        holding = f"holds findings on {counted(len(found), 'adapter')}"
        refuse_evaluation(f"{holding}, but an evaluation covers one; name its findings, such as {found[0]}")
        return Subject(None, several={one.stem: make_subject(load_findings(one), where=one).found for one in found})
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


def title(subject: Subject) -> str:
    """Return a report's title."""
    if subject.several is not None:
        return f"Intruder dimensions of {counted(len(subject.several), 'adapter')}"
    if subject.record is not None:
        return f"{subject.record['command']}: {_name(subject.record['adapter'])}"
    if subject.findings is None:
        assert subject.evaluation is not None
        return f"Evaluation of {_name(subject.evaluation.facts['adapter'])}"
    return f"Intruder dimensions of {_name(subject.findings.sources.get('adapter', {}))}"


def headline(subject: Subject) -> tuple[str, list[tuple[str, str]]]:
    """State the main result in one line, and list the next commands with their purposes."""
    measure = [
        ("Make the adapter forget less, as measured on two of your own texts",
         "streamer repair BASE ADAPTER --findings FINDINGS --general TEXT --task TEXT -o OUTPUT"),
        ("Or, without text", "streamer mitigate BASE ADAPTER --method shrink --lambda 0.75 -o OUTPUT"),
    ]  # fmt: skip
    if subject.several is not None:
        counts = {name: found.intruders for name, found in subject.several.items()}
        most = max(counts, key=lambda name: counts[name])
        leader = f"{printable(most)} has the most intruders, {counts[most]}"
        found = leader if counts[most] else "no adapter has intruders"
        adapters = counted(len(counts), "adapter")
        return f"Of {adapters}, {found}. The effect of mitigation has not been measured yet.", measure[:1]
    if subject.record is not None:
        check = verify_line("BASE", "ADAPTER", subject.record)
        first = (record_lines(subject.record, "")[1], *subject.record.get("measured", ())[:1])[-1]
        return f"{first[:1].upper()}{first[1:]}.", [("Check the files against the inputs", check)]
    if subject.evaluation is not None:
        said = printable(verdict(subject.evaluation, subject.evaluation.best()))
        return f"{said[:1].upper()}{said[1:]}{'' if said.endswith('?') else '.'}", []
    findings = subject.findings
    assert findings is not None
    _, share = delta_energy(findings)
    with_any = sum(bool(m.detection.intruders) for m in findings)
    carrying = f", with {100 * share:.1f}% of the adapter's energy" if findings.intruders else ""
    return (
        f"{counted(findings.intruders, 'intruder')} in {with_any} of {counted(len(findings), 'matrix')}{carrying}. "
        "The effect of mitigation has not been measured yet.", measure,
    )  # fmt: skip


def sentences(subject: Subject) -> list[str]:
    """Describe what was asked and found, or what an output is."""
    if subject.record is not None:
        record, measured = subject.record, subject.record.get("measured", ())
        made = f"streamer {record['version']} made this from “{_name(record['adapter'])}” and “{_name(record['base'])}”"
        lines = record_lines(record, made)
        return [printable(line) for line in measured[1:]] + (lines if measured else [lines[0], *lines[2:]])
    if (findings := subject.findings) is None:
        return []
    sources, options = findings.sources, findings.options
    k = options.top_k
    matrices = counted(len(findings), "matrix")
    changed = f"the {matrices}" if len(findings) == 1 else f"each of the {matrices}"
    judged = f"leading {100 * k:g}% of the singular directions"
    if isinstance(k, int):
        judged = counted(k, "leading singular direction").removeprefix("1 ")
    adapter, base = (f"“{_name(sources[what])}”" if what in sources else f"the {what}" for what in ("adapter", "base"))
    asked = (
        f"In {changed} that {adapter} changes in {base}, detection compared the {judged} of base + adapter with all directions of the "
        f"base. A direction is an intruder if its similarity to every one of them is below {options.threshold_epsilon:g}."
    )
    if not findings.intruders:
        found = "There are no intruders"
        least = min((min(m.detection.similarity) for m in findings if m.detection.similarity), default=None)
        found += "." if least is None else f": the least similar direction has a similarity of {least:.2f}."
        return [asked, found, "Scaling down the whole adapter (a shrink) may still reduce forgetting."]
    parts = Counter(part_of(m.tensor) for m in findings for _ in m.detection.intruders)
    most = listed((f"{printable(part)} ({n})" for part, n in parts.most_common(3)), 3)
    half = next(c for c in lambda_curve(findings) if c["lambda"] == 0.5)
    dropped = max(m.detection.dropped_at_zero for m in findings)
    weighs = (
        f"With method project, λ = 0.5 leaves {100 * half['norm_left']:.1f}% of the delta's norm. With method paper and λ = 0, up to "
        f"{100 * dropped:.1f}% of a matrix's mitigated delta is lost in projection onto the adapter's rank."
    )
    return [asked, f"Intruders by part of a layer: {most}.", weighs]


def certificates(subject: Subject) -> str:
    """State in one line how many decisions are proven; empty for an evaluation alone."""
    if subject.record is not None:
        found = [(m["tensor"], m["certified"]) for m in subject.record["matrices"] if m["certified"] is not None]
    else:
        found = [(m.tensor, m.detection.certified) for m in subject.findings or ()]
    if not found:
        return ""
    detections = [m.detection for m in subject.findings or ()]
    proven, clustered = sum(certified for _, certified in found), sum(bool(d.degenerate) for d in detections)
    solvers = Counter(d.solver for d in detections)
    dense = f"; {solvers['dense']} by a full SVD" if solvers["dense"] else ""
    words = f"in {proven} of {counted(len(found), 'matrix')}, every decision is proven equal to the full SVD's{dense}"
    rest = [tensor for tensor, certified in found if not certified]
    if rest:
        words += f"; not proven: {listed(map(printable, rest))}"
    if clustered:
        words += f"; in {clustered}, some singular values are so close that no single direction is defined"
    return f"Certificates: {words}."


def part_of(tensor: str) -> str:
    """Return the part of a layer that a tensor belongs to: ``model.layers.0.self_attn.q_proj.weight`` → ``q_proj``."""
    parts = [p for p in re.split(r"[.\[\]]+", NUMBER.sub("", tensor)) if p and p != "weight"]
    return parts[-1] if parts else tensor


def _name(source: Mapping[str, Any]) -> str:
    return printable(str(source.get("model_id") or source.get("name") or "an adapter"))


MOST_DIRECTIONS = 400_000
"""Most directions on a page, over all matrices; if there are more, it has the largest of each matrix."""

LEAST_DIRECTIONS = 10
"""Fewest directions for each matrix."""

LEAST_RATIO = 1e-6
"""Smallest ratio of a singular value to the largest that is distinguished from zero."""


def page_data(subject: Subject) -> dict[str, Any]:
    """Make the object. Names are escaped as on a terminal; norms and singular values of findings have only the digits shown."""
    parts = dict.fromkeys(("findings", "evaluation", "output", "several"))
    tree: dict[str, Any] = {"schema": "streamer.page/1", **parts}
    if subject.several is not None:
        most = MOST_DIRECTIONS // len(subject.several)
        tree["several"] = [
            {"name": printable(name), "findings": _findings(f, most)} for name, f in subject.several.items()
        ]
        return tree
    findings, record = subject.findings, subject.record
    if findings is not None:
        tree["findings"] = _findings(findings)
    if subject.evaluation is not None:
        tree["evaluation"] = _evaluation(subject.evaluation)
    if record is not None:
        matrices = sorted(record["matrices"], key=lambda m: natural(m["tensor"]))
        # None if it does not apply: a shrink or coefficients scale no intruders, and a merge is not truncated to a rank.
        scaled, cut = takes_findings(record["method"]), record["command"] == "mitigate"
        tree["output"] = {
            "names": pack_names([printable(m["tensor"]) for m in matrices]),
            "intruders": [len(m["intruders"]) for m in matrices] if scaled else None,
            **{key: [m[key] for m in matrices] for key in ("delta_norm", "delta_norm_after")},
            "dropped": [m["dropped"] for m in matrices] if cut else None,
        }
    return tree


def _findings(findings: Findings, directions: int = MOST_DIRECTIONS) -> dict[str, Any]:
    matrices = sorted(findings, key=lambda m: natural(m.tensor))
    found = [m.detection for m in matrices]
    most = max(LEAST_DIRECTIONS, directions // max(1, len(matrices)))
    shown = [min(most, len(d.singular_values)) for d in found]
    kinds, kind = _numbered(f"{m.shape[0]}×{m.shape[1]} {m.dtype}" for m in matrices)
    doubled = [d.precision == "float64" and m.dtype != "F64" for m, d in zip(matrices, found, strict=True)]
    deciders, decider = _numbered(f"{d.solver}{', float64' * more}" for d, more in zip(found, doubled, strict=True))

    def column(values: Iterable[Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.fromiter(chain.from_iterable(map(getitem, values, map(slice, shown))), np.float64)

    def shares(values: Sequence[float]) -> list[float]:
        """Divide a matrix's singular values by the largest."""
        largest = max(values, default=0.0)
        return [s / largest if largest > 0 else 0.0 for s in values]

    return {
        "epsilon": findings.options.threshold_epsilon,
        "names": pack_names([printable(m.tensor) for m in matrices]),
        "kinds": kinds, "kind": kind, "rank": pack([m.rank for m in matrices]),
        "directions": pack([len(d.singular_values) for d in found]),
        "shown": pack(shown), "count": pack([len(d.intruders) for d in found]),
        "intruder": pack(column([[float(j in d.intruders) for j in range(n)] for d, n in zip(found, shown, strict=True)]), 1),
        "deciders": deciders, "decider": decider, "certified": pack([d.certified for d in found], 1),
        "degenerate": {str(i): list(d.degenerate) for i, d in enumerate(found) if d.degenerate},
        "low": pack_share(column([d.similarity_low for d in found]), 2),
        "high": pack_share(column([d.similarity_high for d in found]), 2, up=True),
        "least": _figures([min(d.similarity, default=1.0) for d in found]),
        "ratio": pack_ratio(column([shares(d.singular_values) for d in found]), 2, LEAST_RATIO),
        "least_ratio": LEAST_RATIO, "sigma": [_short(max(d.singular_values, default=0.0)) for d in found],
        "base_ratio": pack_ratio(column([shares(d.base_singular_values) for d in found]), 2, LEAST_RATIO),
        "base_sigma": [_short(max(d.base_singular_values)) for d in found],
        "delta_norm": [_short(d.delta_norm) for d in found], "energy": _figures([d.intruder_energy for d in found]),
        "dropped": _figures([d.dropped_at_zero for d in found]),
        "thresholds": [[c["epsilon"], c["intruders"], c["least"], c["most"]] for c in threshold_curve(findings)],
        "lambdas": [[c["lambda"], c["paper"], c["project"], c["norm_left"]] for c in lambda_curve(findings)],
    }  # fmt: skip


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    best = evaluation.best()
    drawn = ("kept", "kept_se", "forgetting", "forgetting_se", "divergence", "divergence_se")
    columns = figures(evaluation), field_figures(evaluation.general)
    return {
        "keep": evaluation.keep,
        "methods": list(METHODS),
        "suggested": best.variant and printable(best.variant.name),
        "front": [*map(printable, evaluation.front())],
        "texts": {side: evaluation.facts["texts"][side]["name"] for side in ("general", "task")},
        "others": [*map(printable, evaluation.others)],
        **{key: [{"head": printable(c.head), "about": c.about, "cells": [printable(cell) for cell in c.cells]} for c in part]
           for key, part in zip(("columns", "field"), columns, strict=True)},
        "variants": [
            {"name": printable(v["name"]), "lambda": v["lambda"],
             "series": printable(one.method or one.name.partition(" ")[0]),  # its curve: base and adapter are the ends of all
             **{key: v[key] for key in drawn}}
            for v, one in zip(evaluation.shown_variants(), evaluation.variants, strict=True)
        ],
    }  # fmt: skip


def _figures(shares: Sequence[float]) -> Packed:
    """Pack shares that tables show, in steps of 1e-9; coarser steps would make the page round twice."""
    return pack(np.rint(np.clip(shares, 0.0, 1.0) * (64**5 - 1)), 5)


def _short(value: float) -> float:
    """Round to the digits that tables show on the page and on a terminal, to avoid rounding twice."""
    return float(f"{value:.4g}")


SCRIPTS = ("draw.js", "findings.js", "page.js")

SIGN = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="streamer report">\n'
"""Beginning of every page, which identifies it."""


def make_page(subject: Subject) -> bytes:
    """Make a report's page. It contains no times or paths, so the same inputs give the same bytes.

    All text from the inputs is escaped, or set as text by the script; a policy in the page prevents any other script from running.
    """
    template, style, *scripts = (
        files("streamer.report").joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n" + "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said, next_ = headline(subject)
    lines = [f'<p class="verdict">{html.escape(said)}</p>', *map(_command, next_)]
    if subject.findings is not None:
        lines += [f"<p>{html.escape(line)}</p>" for line in subject.findings.warnings]
    if subject.evaluation is not None:
        lines.append(_suggestion(subject.evaluation))
    lines += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(subject)]
    if proven := certificates(subject):
        lines.append(f'<p class="certificates">{html.escape(proven)}</p>')
    # In a script element, JSON must not end the element or begin markup.
    data = json.dumps(page_data(subject), separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    page = Template(template).substitute(
        digest=digest, title=html.escape(title(subject)), style=style, text="\n".join(lines), data=data,
        script=script.removeprefix("\n"),
    )  # fmt: skip
    return (SIGN + page).encode("utf-8")


def _suggestion(evaluation: Evaluation) -> str:
    """Format an evaluation's suggestion: its reasons as a list, the next commands as code."""
    best = evaluation.best()
    lines = map(printable, (*reasons(evaluation, best), *commands(evaluation, best)))
    found = [(line, re.match(r"([a-z ]+): (streamer .+)", line)) for line in lines]
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line, command in found if command is None)
    return "\n".join([f'<ul id="suggestion">\n{items}</ul>', *(_command((c[1], c[2])) for _, c in found if c)])


def _command(command: tuple[str, str]) -> str:
    """Format a command to copy, below its purpose."""
    label, *words = (html.escape(word) for word in (command[0], *command[1].split(" ")))
    code = " ".join(f"<span>{word}</span>" for word in words)
    return f'<p class="note">{label[:1].upper()}{label[1:]}:</p>\n<pre class="command"><code>{code}</code></pre>'


PAGES = (".html", ".htm")


@dataclass(frozen=True)
class WrittenPage:
    """Result of writing a report.

    Attributes
    ----------
    state
        ``present`` if the page already existed.
    files
        Its size in bytes by name.
    """

    state: Literal["written", "present"]
    files: Mapping[str, int]


def write_files(subject: Subject, output: str | Path, overwrite: bool = False) -> WrittenPage:
    """Write a report's page.

    Parameters
    ----------
    subject
        Subject of the report.
    output
        A name that ends in .html.
    overwrite
        Whether to replace another report there; other files are never replaced.

    Raises
    ------
    UsageError
        If the output's name has another ending.
    OutputError
        If something exists there that must not be replaced, or nothing can be written there.
    """
    path = Path(output)
    check_file_path(path, "report.html", path.name, "page")
    refuse_symlink(path.parent)
    refuse_within_output(path)
    if path.suffix.lower() not in PAGES:
        raise UsageError(
            f"{path}: expected a page, whose name ends in .html; figures for a paper were removed: print the page, or save "
            "pictures of it"
        )
    data = make_page(subject)
    size = {path.name: len(data)}
    if _is_present(path, data, overwrite):
        touch([path])
        return WrittenPage("present", size)
    check_space(path, len(data))
    make_directory(path.parent)
    with locked(lock_of(path), path):
        remove_partials(path.parent, {path.name})
        _is_present(path, data, overwrite)  # another run may have written it meanwhile
        write_atomic(path, data)
    return WrittenPage("written", size)


def _is_present(path: Path, data: bytes, overwrite: bool) -> bool:
    """Test whether a file already has these bytes; refuse a file that must not be replaced."""
    refuse_symlink(path)
    if not is_taken(path):
        return False
    if not path.is_file():
        raise OutputError(f"{path}: is not a regular file; choose another output")
    with storage_errors(path, "read"):
        there = path.read_bytes()
    if there == data:
        return True
    if not there.startswith(SIGN.encode()):
        raise not_own(path, "a report")
    if not overwrite:
        raise holds(path, "another report")
    return False
