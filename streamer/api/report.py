"""Offer reports on findings and outputs, and comparisons of findings, as functions of the library."""

from __future__ import annotations

from collections.abc import Mapping
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
from streamer.report.page import Collection, Subject, WrittenPage, delta_energy, make_subject, open_subject, write_files


@dataclass(frozen=True)
class Report:
    """The subject of a report, for one adapter or several, and the files that were written.

    Attributes
    ----------
    one
        Findings, possibly with an evaluation, or the record of an output.
    several
        Findings of several adapters, by name.
    """

    one: Subject | None
    several: Mapping[str, Findings] | None
    output: str | Path | None = None
    written: WrittenPage | None = None

    def energies(self) -> list[tuple[float, float]]:
        """Compute the energy of each of several adapters' deltas, and the intruders' share of it."""
        return [delta_energy(findings) for findings in (self.several or {}).values()]

    def record(self) -> dict[str, Any]:
        """Make the object that `streamer report --json` prints: the subject itself, or everything that is drawn if files were written."""
        if self.written is None:
            return self._subject()
        files = [{"file": name, "bytes": size} for name, size in self.written.files.items()]
        return {**self._subject(), "output": str(self.output), "state": self.written.state, "files": files}

    def _subject(self) -> dict[str, Any]:
        if self.one is None:
            return {**record_of_several({name: findings.record() for name, findings in (self.several or {}).items()})}
        if self.written is not None or self.one.evaluation is not None:
            return {**self.one.to_dict()}
        return {**self.one.record} if self.one.record is not None else {**self.one.found.record()}


class ReportRequest(ReportOptions):
    """A requested report; see `write_report`. Without an output, nothing is written."""

    def run(self, monitor: Monitor) -> Report:
        """Open the subject, and write the page."""
        subject = self._subject()
        several = subject.findings if isinstance(subject, Collection) else None
        one = None if isinstance(subject, Collection) else subject
        for findings in (several or {}).values() if one is None else [one.findings]:
            monitor.warn(() if findings is None else findings.warnings)
        written = None if self.output is None else write_files(subject, self.output, self.overwrite)
        return Report(one, several, self.output, written)

    def _subject(self) -> Subject | Collection:
        findings, evaluation = self.findings, self.evaluation
        if isinstance(findings, Evaluation):
            if evaluation is not None:
                raise UsageError(
                    "findings: found an evaluation, which was given beside it too; give one alone, or findings"
                )
            return Subject(None, findings)
        if not isinstance(findings, Findings) and not isinstance(evaluation, Evaluation):
            return open_subject(findings, evaluation)
        found = findings if isinstance(findings, Findings) else load_findings(findings)
        return make_subject(found, load_evaluation(evaluation) if isinstance(evaluation, str | Path) else evaluation)


def write_report(
    findings: Findings | Evaluation | str | Path,
    output: str | Path,
    *,
    evaluation: Evaluation | str | Path | None = None,
    overwrite: bool = False,
) -> None:
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
