"""Describe in sentences what was asked and found, how far it is proven, and what an evaluation suggests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from streamer.detection.findings import Findings
from streamer.errors import printable
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.view import commands, reasons, verdict
from streamer.output.model_card import verify_line
from streamer.output.record_view import record_lines
from streamer.report.curves import delta_energy, lambda_curve
from streamer.report.packing import NUMBER
from streamer.report.subject import Collection, Subject
from streamer.units import counted, listed


def title(subject: Subject | Collection) -> str:
    """Return a report's title."""
    if isinstance(subject, Collection):
        return f"Intruder dimensions of {counted(len(subject.findings), 'adapter')}"
    if subject.record is not None:
        return f"{subject.record['command']}: {_name(subject.record['adapter'])}"
    if subject.findings is None:
        assert subject.evaluation is not None
        return f"Evaluation of {_name(subject.evaluation.facts['adapter'])}"
    return f"Intruder dimensions of {_name(subject.findings.sources.get('adapter', {}))}"


def headline(subject: Subject | Collection) -> tuple[str, list[tuple[str, str]]]:
    """State the main result in one line, and list the next commands with their purposes."""
    measure = [
        ("Make the adapter forget less, as measured on two of your own texts",
         "streamer repair BASE ADAPTER --findings FINDINGS --general TEXT --task TEXT -o OUTPUT"),
        ("Or, without text", "streamer mitigate BASE ADAPTER --method shrink --lambda 0.75 -o OUTPUT"),
    ]  # fmt: skip
    if isinstance(subject, Collection):
        counts = {name: found.intruders for name, found in subject.findings.items()}
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
    return [] if subject.findings is None else _of_findings(subject.findings)


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


def suggestion(evaluation: Evaluation) -> list[str]:
    """List the reasons for an evaluation's suggestion, and the next commands."""
    best = evaluation.best()
    return [printable(line) for line in (*reasons(evaluation, best), *commands(evaluation, best))]


def part_of(tensor: str) -> str:
    """Return the part of a layer that a tensor belongs to: ``model.layers.0.self_attn.q_proj.weight`` → ``q_proj``."""
    parts = [p for p in re.split(r"[.\[\]]+", NUMBER.sub("", tensor)) if p and p != "weight"]
    return parts[-1] if parts else tensor


def _name(source: Mapping[str, Any]) -> str:
    return printable(str(source.get("model_id") or source.get("name") or "an adapter"))


def _of_findings(findings: Findings) -> list[str]:
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
