"""Format reports: tables for findings, outputs and several adapters, and the files that were written."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from streamer.api.views import Names
from streamer.cli.evaluation_table import evaluation_table
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import findings_table, next_step, record_table, stood
from streamer.units import counted, format_size

if TYPE_CHECKING:
    from streamer.api.report import Report
    from streamer.report.subject import Subject


def report_text(report: Report, where: str, screen: Screen) -> str:
    """Format a report's subject, with an evaluation if given, and state what was written or what to do next."""
    one, parts = report.one, [_adapters(report, screen) if report.one is None else _one(report.one, where, screen)]
    if report.written is not None:
        files = report.written.files
        last = f"{stood(report.output, report.written.state)}: {counted(len(files), 'file')}, {format_size(sum(files.values()))}"
        parts.append(fit(last, screen.width))
    if one is not None and one.record is None and one.evaluation is None:
        parts.append(next_step(one.found, where, screen))
    return "\n\n".join(parts)


def _one(subject: Subject, where: str, screen: Screen) -> str:
    if subject.record is not None:
        return record_table({**subject.record, "state": "read"}, where, screen)
    if subject.findings is None:
        assert subject.evaluation is not None
        return evaluation_table(subject.evaluation, Names(output=shlex.quote(where)), screen)
    text = findings_table(subject.findings, screen)
    if subject.evaluation is None:
        return text
    return f"{text}\n\n{evaluation_table(subject.evaluation, Names(findings=shlex.quote(where)), screen)}"


def _adapters(report: Report, screen: Screen) -> str:
    """Format one line for each adapter, with its totals."""
    found, energies = report.several or {}, report.energies()
    columns = [
        Column("adapter", list(found), "name of its findings file", left=True, names=True),
        Column("matrices", [str(len(f)) for f in found.values()], "matrices that it changes", priority=3),
        Column("intruders", [str(f.intruders) for f in found.values()], "intruders in all matrices", priority=9),
        Column("in", [str(sum(bool(m.detection.intruders) for m in f)) for f in found.values()], "matrices with intruders", priority=2),
        Column("|delta|", [f"{math.sqrt(energy):#.4g}" for energy, _ in energies], "Frobenius norm of the delta", priority=4),
        Column("energy", [f"{100 * share:.1f}%" for _, share in energies], "the intruders' share of |delta|^2", priority=8),
        Column("lost", [f"{100 * max((m.detection.dropped_at_zero for m in f), default=0.0):.1f}%" for f in found.values()],
               "largest share of a matrix's delta lost in projection by `mitigate --lambda 0 --method paper`", priority=5),
        Column("certified", [str(sum(m.detection.certified for m in f)) for f in found.values()], "matrices with proven decisions", 6),
    ]  # fmt: skip
    return table(columns, screen)
