"""Make a report's page: one HTML file that contains its style, script and data, and loads nothing.

The subject of a report is findings, an evaluation, or the record of an output. Its curves are computed from findings: the number of
intruders by threshold, and the norm that each λ removes. Its sentences describe what was asked and found, how far it is proven, and what an
evaluation suggests. The page is written atomically, and replaces nothing but reports.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

import numpy as np

from streamer.detection.findings import Findings, MatrixFinding, load_findings
from streamer.errors import FormatError, OutputError, UsageError, printable
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.evaluation.words import commands, figures, reasons, verdict
from streamer.events import Monitor
from streamer.fitting.choice import repair_columns
from streamer.methods import METHODS, Shrink, takes_findings
from streamer.output.record import record_lines, verify_line
from streamer.plan.name_matching import natural
from streamer.storage import transaction
from streamer.storage.atomic_file import remove_partials, write_atomic
from streamer.storage.files import locked, make_directory, storage_errors
from streamer.tables import Column
from streamer.units import counted, listed
from streamer.verification.verify import RECORD_NAME, read_record

DRAWN_LAMBDAS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
"""Values of λ for which a report shows the norm removed."""

THRESHOLDS = tuple(i / 50 for i in range(1, 51))
"""Thresholds ε at which to count intruders, in addition to the findings' own."""


class Threshold(NamedTuple):
    """A threshold, and the directions below it: as decided, and how many at least and at most by their proven intervals."""

    epsilon: float
    intruders: int
    least: int
    most: int


class Removal(NamedTuple):
    """What a λ removes, over all matrices, as shares of the delta's norm, and the norm that ``project`` leaves.

    ``paper``: ``‖Δ' − Δ‖ / ‖Δ‖ = (1 − λ) ‖Σ_I‖ / ‖Δ‖``; ``project``: ``(1 − λ) √e``, with the intruders' share e of the delta's energy;
    ``norm_left``: ``√(1 − (1 − λ²) e)``, which is λ of the shrink with the same norm.
    """

    mitigation_lambda: float
    paper: float
    project: float
    norm_left: float


def delta_energy(findings: Findings) -> tuple[float, float]:
    """Sum ``‖Δ‖²`` over all matrices, and compute the intruders' share of it."""
    norms = [m.detection.delta_norm**2 for m in findings]
    by_intruders = [m.detection.delta_norm**2 * m.detection.intruder_energy for m in findings]
    total = math.fsum(norms)
    return total, math.fsum(by_intruders) / total if total > 0 else 0.0


def threshold_curve(findings: Findings) -> list[Threshold]:
    """Count the directions below each threshold, in rising order; the findings' own threshold is included."""
    columns = []
    for name in ("similarity", "similarity_low", "similarity_high"):
        values = chain.from_iterable(getattr(m.detection, name) for m in findings)
        columns.append(np.sort(np.fromiter(values, np.float64)))
    curve = []
    for epsilon in sorted({*THRESHOLDS, findings.options.threshold_epsilon}):
        intruders, most, least = (int(np.searchsorted(column, epsilon)) for column in columns)
        curve.append(Threshold(epsilon, intruders, least, most))
    return curve


def lambda_curve(findings: Findings) -> list[Removal]:
    """Compute what each λ removes."""
    total, share = delta_energy(findings)
    intruding = math.fsum(
        m.detection.singular_values[j] ** 2 for m in findings for j in m.detection.intruders
    )
    paper = math.sqrt(intruding / total) if total > 0 else 0.0
    project = math.sqrt(share)
    curve = []
    for lam in DRAWN_LAMBDAS:
        left = math.sqrt(max(0.0, 1 - (1 - lam * lam) * share))
        curve.append(Removal(lam, (1 - lam) * paper, (1 - lam) * project, left))
    return curve


Subject = Findings | Evaluation | Mapping[str, Any]
"""Subject of a report; a mapping is the record of an output, ``streamer.json``."""


def open_subject(path: str | Path) -> Subject:
    """Read the subject of a report: findings, an evaluation, or an output's directory with ``streamer.json``.

    Raises
    ------
    InputError
        If it is something else.
    """
    path = Path(path)
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        is_evaluation = b'"streamer.evaluation/' in file.read(200)
    if is_evaluation:
        return load_evaluation(path)
    if path.is_dir() and (path / RECORD_NAME).exists():
        record = read_record(path)
        if isinstance(record, str):
            raise FormatError(
                f"{path / RECORD_NAME}: {record}; `streamer verify` gives details; the output's command writes it again"
            )
        return record
    return load_findings(path)


def check_finite(findings: Findings, where: object) -> None:
    """Refuse findings with a figure that is not finite, which neither a page nor JSON holds."""
    for m in findings:
        d = m.detection
        similarities = chain(d.similarity, d.similarity_low, d.similarity_high)
        values = chain(d.singular_values, d.base_singular_values)
        numbers = (d.delta_norm, d.intruder_energy, d.dropped_at_zero, d.cutoff, m.scale)
        if not all(map(math.isfinite, chain(numbers, similarities, values))):
            raise FormatError(f"{where}: a figure of {m.tensor} is NaN or Inf; run detect again")


def title(subject: Subject) -> str:
    """Return a report's title."""
    if isinstance(subject, Findings):
        return f"Intruder dimensions of {_name(subject.sources.get('adapter', {}))}"
    if isinstance(subject, Evaluation):
        return f"Evaluation of {_name(subject.facts['adapter'])}"
    return f"{VERBS[_verb(subject)]} {_name(subject['adapter'])}"


VERBS = {"repair": "Repair of", "mitigate": "Mitigation of", "merge": "Merge of"}


def _verb(record: Mapping[str, Any]) -> str:
    """Name the command that made an output."""
    return "repair" if "measured" in record else str(record["command"])


def headline(subject: Subject) -> tuple[str, list[tuple[str, str]]]:
    """State the main result in one line, and list the next commands with their purposes."""
    if isinstance(subject, Evaluation):
        sentence = printable(verdict(subject, subject.best()))
        return f"{sentence[:1].upper()}{sentence[1:]}{'' if sentence.endswith('?') else '.'}", []
    if not isinstance(subject, Findings):
        check = verify_line("BASE", "ADAPTER", subject)
        first = (record_lines(subject, "")[1], *subject.get("measured", ())[:1])[-1]
        return f"{first[:1].upper()}{first[1:]}.", [("Check the files against the inputs", check)]
    _, share = delta_energy(subject)
    with_any = sum(bool(m.detection.intruders) for m in subject)
    carrying = f", with {100 * share:.1f}% of the adapter's energy" if subject.intruders else ""
    found = f"{counted(subject.intruders, 'intruder')} in {with_any} of {counted(len(subject), 'matrix')}{carrying}"
    repair = (
        "Make the adapter forget less, and measure it",
        "streamer repair BASE ADAPTER -o OUTPUT",
    )
    return f"{found}. The effect of mitigation has not been measured yet.", [repair]


def sentences(subject: Subject) -> list[str]:
    """Describe what was asked, or what an output is."""
    if isinstance(subject, Evaluation):
        return []
    if not isinstance(subject, Findings):
        made = f"streamer {subject['version']} made this from “{_name(subject['adapter'])}” and “{_name(subject['base'])}”"
        first, how, *others = record_lines(subject, made)
        # The headline of other outputs says how they were made; the table of a repair, what was measured.
        figures = () if "repair" in subject else subject.get("measured", ())[1:]
        return [*map(printable, figures), first, *([how] if "measured" in subject else []), *others]
    sources = subject.sources
    options = subject.options
    k = options.top_k
    matrices = counted(len(subject), "matrix")
    changed = f"the {matrices}" if len(subject) == 1 else f"each of the {matrices}"
    judged = f"leading {100 * k:g}% of the singular directions"
    if isinstance(k, int):
        judged = counted(k, "leading singular direction").removeprefix("1 ")
    names = {"adapter": "the adapter", "base": "the base"}
    names |= {role: f"“{_name(sources[role])}”" for role in names.keys() & sources.keys()}
    return [
        f"In {changed} that {names['adapter']} changes in {names['base']}, detection compared the {judged} of base + adapter with "
        "all directions of the base. A direction is an intruder if its similarity to every one of them is below "
        f"{options.threshold_epsilon:g}."
    ]


def sample_texts(subject: Subject) -> list[str]:
    """Return the beginnings of texts that the adapter wrote, if it did."""
    if isinstance(subject, Findings):
        return []
    if isinstance(subject, Evaluation):
        of = subject.facts["texts"]["task"]
    else:
        of = subject.get("repair", {})
    return [printable(textwrap.shorten(text, SAMPLE_CHARACTERS)) for text in of.get("samples", ())]


SAMPLE_CHARACTERS = 400
"""Most characters of a sample."""


def certificates(subject: Subject) -> str:
    """State in one line how many decisions are proven; empty if there are none."""
    if isinstance(subject, Evaluation):
        return ""
    if isinstance(subject, Findings):
        decisions = [(m.tensor, m.detection.certified) for m in subject]
    else:
        decisions = [
            (m["tensor"], m["certified"]) for m in subject["matrices"] if m["certified"] is not None
        ]
    if not decisions:
        return ""
    unproven = [printable(tensor) for tensor, certified in decisions if not certified]
    matrices = f"{len(decisions) - len(unproven)} of {counted(len(decisions), 'matrix')}"
    return (
        f"Certificates: in {matrices}, every decision is proven equal to the full SVD's"
        f"{f'; not proven: {listed(unproven)}' if unproven else ''}."
    )


def _name(source: Mapping[str, Any]) -> str:
    return printable(str(source.get("model_id") or source.get("name") or "an adapter"))


MOST_DIRECTIONS = 400_000
"""Most directions on a page, over all matrices; if there are more, it has the largest of each matrix."""

STEPS = 10_000
"""A similarity is rounded to a multiple of 1 / STEPS, which is finer than a screen shows."""

LEAST_DIRECTIONS = 10
"""Fewest directions for each matrix."""


def page_data(subject: Subject) -> dict[str, Any]:
    """Make the object. Names are escaped as on a terminal; norms and singular values of findings have only the digits shown."""
    if isinstance(subject, Findings):
        return {"findings": _findings(subject)}
    if isinstance(subject, Evaluation):
        return {"evaluation": _evaluation(subject), "samples": sample_texts(subject)}
    matrices = sorted(subject["matrices"], key=lambda m: natural(m["tensor"]))
    # None if it does not apply: a shrink or coefficients scale no intruders, and a merge is not truncated to a rank.
    is_scaled = takes_findings(subject["method"])
    is_truncated = subject["command"] == "mitigate"
    data: dict[str, Any] = {}
    if "repair" in subject:
        data = {"repair": _repair(subject["repair"]), "samples": sample_texts(subject)}
    data["output"] = {
        "names": [printable(m["tensor"]) for m in matrices],
        "intruders": [len(m["intruders"]) for m in matrices] if is_scaled else None,
        **{key: [m[key] for m in matrices] for key in ("delta_norm", "delta_norm_after")},
        "dropped": [m["dropped"] for m in matrices] if is_truncated else None,
    }
    return data


def _findings(findings: Findings) -> dict[str, Any]:
    matrices = sorted(findings, key=lambda m: natural(m.tensor))
    directions = max(LEAST_DIRECTIONS, MOST_DIRECTIONS // max(1, len(matrices)))
    return {
        "epsilon": findings.options.threshold_epsilon,
        "thresholds": threshold_curve(findings),
        "lambdas": lambda_curve(findings),
        "matrices": [_matrix(m, directions) for m in matrices],
    }


def _matrix(m: MatrixFinding, directions: int) -> dict[str, Any]:
    """Describe a matrix and so many of its directions; intervals of similarity are rounded outwards."""
    d = m.detection
    solver = f"{d.solver}, float64" if d.precision == "float64" and m.dtype != "F64" else d.solver
    unsure = [] if d.certified else ["clustered" if d.degenerate else "open"]
    return {
        "name": printable(m.tensor),
        "kind": f"{m.shape[0]}×{m.shape[1]} {m.dtype}",
        "rank": m.rank,
        "directions": len(d.singular_values),
        "intruders": d.intruders,
        "decided": ", ".join([solver, *unsure]),
        "low": [math.floor(STEPS * low) / STEPS for low in d.similarity_low[:directions]],
        "high": [math.ceil(STEPS * high) / STEPS for high in d.similarity_high[:directions]],
        "least": round(min(d.similarity, default=1.0), 9),
        "values": [_short(s) for s in d.singular_values[:directions]],
        "base_values": [_short(s) for s in d.base_singular_values[:directions]],
        "norm": _short(d.delta_norm),
        "energy": round(d.intruder_energy, 9),
        "dropped": round(d.dropped_at_zero, 9),
    }


def _repair(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a repair keeps and leaves, as a picture of an evaluation does, and its table."""
    figure = "kept" if measured["reliable"]["kept"] else "behaviour_kept"
    at_origin = dict.fromkeys(("kept", "kept_se", "divergence", "divergence_se"), 0)
    variants: list[dict[str, Any]] = [
        {"name": "base", "series": "base", "lambda": None, **at_origin}
    ]
    for row in measured["rows"]:
        series, _, value = row["name"].partition(" ")
        variant = {
            "name": row["name"],
            "series": series,
            "lambda": float(value) if series == Shrink.name else None,
            "kept": row[figure],
            "kept_se": row[f"{figure}_se"],
            "divergence": row["divergence"],
            "divergence_se": row["divergence_se"],
        }
        variants.append(variant)
    return {
        "keep": measured["keep"],
        "methods": list(METHODS),
        "suggested": next(row["name"] for row in measured["rows"] if row["written"]),
        "front": [variant["name"] for variant in variants],
        "figure": "learning kept" if figure == "kept" else "behaviour kept",
        "variants": variants,
        "columns": _columns(repair_columns(measured)),
    }


def _columns(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Describe a table's columns, with escaped texts."""
    return [
        {"head": printable(c.head), "about": c.about, "cells": [*map(printable, c.cells)]}
        for c in columns
    ]


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    best = evaluation.best()
    drawn = ("kept", "kept_se", "forgetting", "forgetting_se", "divergence", "divergence_se")
    return {
        "keep": evaluation.keep,
        "methods": list(METHODS),
        "suggested": best.variant and printable(best.variant.name),
        "front": [*map(printable, evaluation.front())],
        "texts": {side: evaluation.facts["texts"][side]["name"] for side in ("general", "task")},
        "others": [*map(printable, evaluation.others)],
        "columns": _columns(figures(evaluation)),
        "variants": [
            {
                "name": printable(record["name"]),
                "lambda": record["lambda"],
                "series": printable(
                    variant.method or variant.name.partition(" ")[0]
                ),  # its curve: base and adapter are the ends of all
                **{key: record[key] for key in drawn},
            }
            for record, variant in zip(
                evaluation.shown_variants(), evaluation.variants, strict=True
            )
        ],
    }


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
        files("streamer.report").joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n" + "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    result, next_commands = headline(subject)
    tree = page_data(subject)
    lines = [f'<p class="verdict">{html.escape(result)}</p>', *map(_command, next_commands)]
    if isinstance(subject, Findings):
        lines += [f"<p>{html.escape(line)}</p>" for line in subject.warnings]
    if isinstance(subject, Evaluation):
        lines.append(_suggestion(subject))
    told = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(subject)]
    if "repair" in tree:  # its picture and table say more
        told = ["<details><summary>How it was made</summary>", *told, "</details>"]
    lines += told
    if proven := certificates(subject):
        lines.append(f'<p class="certificates">{html.escape(proven)}</p>')
    # In a script element, JSON must not end the element or begin markup.
    data = json.dumps(tree, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    page = Template(template).substitute(
        digest=digest,
        title=html.escape(title(subject)),
        style=style,
        text="\n".join(lines),
        data=data,
        script=script.removeprefix("\n"),
    )
    return (SIGN + page).encode("utf-8")


def _suggestion(evaluation: Evaluation) -> str:
    """Format an evaluation's suggestion: its reasons as a list, the next commands as code."""
    best = evaluation.best()
    items = ""
    to_run = []
    for line in map(printable, (*reasons(evaluation, best), *commands(evaluation, best))):
        if command := re.match(r"([a-z ]+): (streamer .+)", line):
            to_run.append(_command((command[1], command[2])))
        else:
            items += f"<li>{html.escape(line)}</li>\n"
    return "\n".join([f'<ul id="suggestion">\n{items}</ul>', *to_run])


def _command(command: tuple[str, str]) -> str:
    """Format a command to copy, below its purpose."""
    label, *words = (html.escape(word) for word in (command[0], *command[1].split(" ")))
    code = " ".join(f"<span>{word}</span>" for word in words)
    return f'<p class="note">{label[:1].upper()}{label[1:]}:</p>\n<pre class="command"><code>{code}</code></pre>'


PAGES = (".html", ".htm")


class WrittenPage(NamedTuple):
    """What became of a page, which was there if `present`, and its size."""

    state: Literal["written", "present"]
    nbytes: int


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
    transaction.check_file_path(path, "report.html", path.name, "page")
    transaction.refuse_symlink(path.parent)
    transaction.refuse_within_output(path)
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"{path}: expected a name that ends in .html, such as {path}.html")
    data = make_page(subject)
    if _is_present(path, data, overwrite):
        transaction.touch([path], Monitor())
        return WrittenPage("present", len(data))
    transaction.check_space(path, len(data))
    make_directory(path.parent)
    with locked(transaction.lock_of(path), path):
        remove_partials(path.parent, {path.name})
        _is_present(path, data, overwrite)  # another run may have written it meanwhile
        write_atomic(path, data)
    return WrittenPage("written", len(data))


def _is_present(path: Path, data: bytes, overwrite: bool) -> bool:
    """Test whether a file already has these bytes; refuse a file that must not be replaced."""
    transaction.refuse_symlink(path)
    if not transaction.is_taken(path):
        return False
    if not path.is_file():
        raise OutputError(f"{path}: is not a regular file; choose another output")
    with storage_errors(path, "read"):
        old = path.read_bytes()
    if old == data:
        return True
    if not old.startswith(SIGN.encode()):
        raise transaction.not_own(path, "a report")
    if not overwrite:
        raise transaction.holds(path, "another report")
    return False
