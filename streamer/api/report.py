"""Offer reports on findings and outputs as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.detection.findings import Findings
from streamer.evaluation.evaluation import Evaluation
from streamer.events import Monitor
from streamer.options import ReportOptions
from streamer.report.page import Subject, WrittenPage, check_finite, open_subject, write_files


@dataclass(frozen=True)
class Report:
    """The subject of a report, and the page if it was written."""

    subject: Subject
    output: str | Path | None
    written: WrittenPage | None

    def record(self) -> dict[str, Any]:
        """Make the object that `streamer report --json` prints: the subject's, and the page's path and state."""
        record: Mapping[str, Any]
        match self.subject:
            case Findings() as findings:
                record = findings.record()
            case Evaluation() as evaluation:
                record = evaluation.to_dict()
            case of_output:
                record = of_output
        if self.written is None:
            return {**record}
        return {**record, "output": str(self.output), "state": self.written.state}


class ReportRequest(ReportOptions):
    """A requested report; see `write_report`. Without an output, nothing is written."""

    def run(self, monitor: Monitor) -> Report:
        """Open the subject, and write the page."""
        given = self.findings
        subject = given if isinstance(given, Findings | Evaluation) else open_subject(given)
        if isinstance(subject, Findings):
            check_finite(subject, "findings" if subject is given else given)
            monitor.warn(subject.warnings)
        written = None if self.output is None else write_files(subject, self.output, self.overwrite)
        return Report(subject, self.output, written)


def write_report(
    findings: Findings | Evaluation | str | Path, output: str | Path, *, overwrite: bool = False
) -> None:
    """Write findings, an evaluation or the record of an output as an HTML page.

    Parameters
    ----------
    findings
        Findings, an evaluation, the path of the file of either, or an output's directory.
    output
        Path that ends in ``.html``, for one page that loads no other files.
    overwrite
        Whether to replace another report. Other files are never replaced.

    Raises
    ------
    StreamerError
        If the input is something else, or the output path holds something else (see `streamer.errors`).
    """
    ReportRequest(findings=findings, output=output, overwrite=overwrite).run(Monitor())
