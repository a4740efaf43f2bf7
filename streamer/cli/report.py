"""Run `report` and `diff`: tables and JSON of findings, outputs and what became of intruders, and the files of a report."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.api.reporting import report_coefficients
from streamer.cli.diff_table import diff_table
from streamer.cli.evaluation_table import evaluation_table
from streamer.cli.json_report import of_several
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import findings_table, next_step, record_table, stood
from streamer.detection.findings import load_findings
from streamer.detection.findings_records import FindingsRecord
from streamer.errors import UsageError
from streamer.evaluation.view import Names
from streamer.events import Monitor
from streamer.report.curves import delta_energy
from streamer.report.diff import diff_findings
from streamer.report.files import write_files
from streamer.report.subject import Collection, Subject, open_subject
from streamer.units import counted, format_size


def run_report(args: argparse.Namespace, monitor: Monitor, screen: Screen) -> tuple[Mapping[str, Any], str]:
    """Show findings, with an evaluation beside them, or an output's record; with ``-o`` write the page or the figures."""
    coefficients = args.coefficients is not None or args.adapter is not None or args.keep is not None
    if coefficients or (args.base is not None and Path(args.base).is_dir()):
        return _with_coefficients(args, monitor, screen)
    subject = open_subject(args.findings, args.base)
    if isinstance(subject, Collection):
        for one in subject.subjects.values():
            monitor.warn(() if one.findings is None else one.findings.warnings)
        tree, text = _several(subject, screen)
        return (tree, text) if args.output is None else _written(subject, args, tree, text, screen)
    monitor.warn(() if subject.findings is None else subject.findings.warnings)
    text = _text(subject, args.findings, screen)
    if args.output is not None:
        tree, text = _written(subject, args, subject.to_dict(), text, screen)
    elif subject.evaluation is not None:
        tree = subject.to_dict()
    else:
        tree = dict(subject.record) if subject.findings is None and subject.record else _findings(subject)
    if subject.findings is None or subject.evaluation is not None:
        return tree, text
    return tree, f"{text}\n\n{next_step(subject.findings, args.findings, screen)}"


def _written(
    subject: Subject | Collection, args: argparse.Namespace, tree: Mapping[str, Any], text: str, screen: Screen
) -> tuple[Mapping[str, Any], str]:
    """Write the page or the figures, and say so behind the object and the text."""
    written = write_files(subject, args.output, args.overwrite)
    files = [{"file": name, "bytes": size} for name, size in written.files.items()]
    tree = {**tree, "output": str(args.output), "state": written.state, "files": files}
    last = f"{stood(args.output, written.state)}: {counted(len(files), 'file')}, {format_size(sum(written.files.values()))}"
    return tree, f"{text}\n\n{fit(last, screen.width)}"


def _several(subject: Collection, screen: Screen) -> tuple[Mapping[str, Any], str]:
    """Format a line for each adapter, with its totals."""
    found = {name: one.findings for name, one in subject.subjects.items() if one.findings is not None}
    energies = [delta_energy(findings) for findings in found.values()]
    columns = [
        Column("adapter", list(found), "name of its findings file", left=True, names=True),
        Column("matrices", [str(len(f)) for f in found.values()], "that it changes", keep=3),
        Column("intruders", [str(f.intruders) for f in found.values()], "in all of its matrices", keep=9),
        Column("in", [str(sum(bool(m.detection.intruders) for m in f)) for f in found.values()], "matrices with intruders", keep=2),
        Column("|delta|", [f"{math.sqrt(energy):#.4g}" for energy, _ in energies], "Frobenius norm of what the adapter adds", keep=4),
        Column("energy", [f"{100 * share:.1f}%" for _, share in energies], "the intruders' share of |delta|^2", keep=8),
        Column("lost", [f"{100 * max((m.detection.dropped_at_zero for m in f), default=0.0):.1f}%" for f in found.values()],
               "the most of a matrix that `mitigate --lambda 0 --method paper` loses in projection onto its rank", keep=5),
        Column("certified", [str(sum(m.detection.certified for m in f)) for f in found.values()], "matrices with proven decisions", keep=6),
    ]  # fmt: skip
    parts = {name: ({**findings.record()}, "") for name, findings in found.items()}
    return of_several(parts)[0], table(columns, screen)


def _with_coefficients(args: argparse.Namespace, monitor: Monitor, screen: Screen) -> tuple[Mapping[str, Any], str]:
    if args.coefficients is None or args.adapter is None:
        raise UsageError(
            "report: expected --coefficients, BASE and ADAPTER together; as `streamer report FINDINGS BASE ADAPTER --coefficients FILE`"
        )
    if args.output is not None:
        raise UsageError(
            "--output: a page is of findings and an evaluation; leave out --coefficients, BASE and ADAPTER"
        )
    findings = load_findings(args.findings)
    record = report_coefficients(findings, args.base, args.adapter, args.coefficients, keep=args.keep, io=args.io,
                                 base_is_residual=args.base_is_residual, lora_b_layout=args.lora_b_layout,
                                 ignore_keys=args.ignore_keys or (), architecture=args.architecture, monitor=monitor)  # fmt: skip
    return record, findings_table(findings, screen, record=record)


def run_diff(args: argparse.Namespace, monitor: Monitor, screen: Screen) -> tuple[Mapping[str, Any], str]:
    """Show what became of each intruder between two findings."""
    found = diff_findings(load_findings(args.first), load_findings(args.second))
    monitor.warn(found.notes)
    return found.to_dict(), diff_table(found, screen)


def _findings(subject: Subject) -> FindingsRecord:
    assert subject.findings is not None
    return subject.findings.record()


def _text(subject: Subject, where: str, screen: Screen) -> str:
    if subject.record is not None:
        return record_table({**subject.record, "state": "read"}, where, screen)
    assert subject.findings is not None
    text = findings_table(subject.findings, screen)
    if subject.evaluation is None:
        return text
    return f"{text}\n\n{evaluation_table(subject.evaluation, Names(findings=shlex.quote(where)), screen)}"
