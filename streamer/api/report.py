"""Offer the page and the figures of a report as a function of the library."""

from __future__ import annotations

from pathlib import Path

from streamer.detection.findings import Findings, load_findings
from streamer.evaluation.evaluation import Evaluation, load_evaluation
from streamer.report.files import write_files
from streamer.report.subject import make_subject, open_subject


def write_report(
    findings: Findings | str | Path,
    output: str | Path,
    *,
    evaluation: Evaluation | str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write findings as a page to look at, or as figures for a paper.

    Parameters
    ----------
    findings
        Findings, the file that they are in, or a directory of such files, for one page of several adapters.
    output
        A name that ends in ``.html``, for one page that loads nothing; or a directory, for SVG and PNG, which take matplotlib
        (``pip install 'intruder-streamer[plots]'``).
    evaluation
        An evaluation of the same base and adapter, or the file that it is in: its trade-off is drawn as well.
    overwrite
        Whether another report that stands there is replaced; anything else never is.

    Raises
    ------
    StreamerError
        If the inputs do not belong together, something else stands at the output, or matplotlib is missing (see `streamer.errors`).
    """
    if not isinstance(findings, Findings) and not isinstance(evaluation, Evaluation):
        write_files(open_subject(findings, evaluation), output, overwrite)
        return
    found = findings if isinstance(findings, Findings) else load_findings(findings)
    measured = evaluation if isinstance(evaluation, Evaluation) or evaluation is None else load_evaluation(evaluation)
    write_files(make_subject(found, measured), output, overwrite)
