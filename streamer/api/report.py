"""Offer reports on findings and outputs, and comparisons of findings, as functions of the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.api.records import several as record_of_several
from streamer.detection.findings import Findings, load_findings
from streamer.errors import UsageError
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.events import Monitor
from streamer.options import DiffOptions, ReportOptions
from streamer.report.diff import FindingsDiff, diff_findings
from streamer.report.page import Subject, WrittenPage, delta_energy, make_subject, open_subject, write_files


@dataclass(frozen=True)
class Report:
    """The subject of a report, and the files that were written."""

    subject: Subject
    output: str | Path | None
    written: WrittenPage | None

    def energies(self) -> list[tuple[float, float]]:
        """Compute the energy of each of several adapters' deltas, and the intruders' share of it."""
        return [delta_energy(findings) for findings in (self.subject.several or {}).values()]

    def record(self) -> dict[str, Any]:
        """Make the object that `streamer report --json` prints: the subject itself, or everything that is drawn if files were written."""
        subject, written = self.subject, self.written
        tree: dict[str, Any]
        if subject.several is not None:
            tree = {**record_of_several({name: findings.record() for name, findings in subject.several.items()})}
        elif written is not None or subject.evaluation is not None:
            tree = {**subject.to_dict()}
        else:
            tree = {**subject.record} if subject.record is not None else {**subject.found.record()}
        if written is None:
            return tree
        files = [{"file": name, "bytes": size} for name, size in written.files.items()]
        return {**tree, "output": str(self.output), "state": written.state, "files": files}


class ReportRequest(ReportOptions):
    """A requested report; see `write_report`. Without an output, nothing is written."""

    def run(self, monitor: Monitor) -> Report:
        """Open the subject, and write the page."""
        findings, evaluation = self.findings, self.evaluation
        if isinstance(findings, Evaluation):
            if evaluation is not None:
                raise UsageError(
                    "findings: found an evaluation, which was given beside it too; give one alone, or findings"
                )
            subject = Subject(None, findings)
        elif isinstance(findings, Findings) or isinstance(evaluation, Evaluation):
            found = findings if isinstance(findings, Findings) else load_findings(findings)
            subject = make_subject(
                found, load_evaluation(evaluation) if isinstance(evaluation, str | Path) else evaluation
            )
        else:
            subject = open_subject(findings, evaluation)
        for one in [subject.findings] if subject.several is None else subject.several.values():
            monitor.warn(() if one is None else one.warnings)
        written = None if self.output is None else write_files(subject, self.output, self.overwrite)
        return Report(subject, self.output, written)


def write_report(findings: Findings | Evaluation | str | Path, output: str | Path, *,
                 evaluation: Evaluation | str | Path | None = None, overwrite: bool = False) -> None:  # fmt: skip
    """Write findings or an evaluation as an HTML page.

    Parameters
    ----------
    findings
        Findings, the path of their file, or a directory of such files, for one page on several adapters; or an evaluation or its file.
    output
        Path that ends in ``.html``, for one page that loads no other files.
    evaluation
        Evaluation of the same base and adapter, or the path of its file; its trade-off is drawn too.
    overwrite
        Whether to replace another report. Other files are never replaced.

    Raises
    ------
    StreamerError
        If the inputs do not belong together, or the output path holds something else (see `streamer.errors`).
    """
    ReportRequest(findings=findings, evaluation=evaluation, output=output, overwrite=overwrite).run(Monitor())


class DiffRequest(DiffOptions):
    """A requested comparison; see `diff_findings`."""

    def run(self, monitor: Monitor) -> FindingsDiff:
        """Compare the findings in the two files."""
        found = diff_findings(load_findings(self.first), load_findings(self.second))
        monitor.warn(found.notes)
        return found
