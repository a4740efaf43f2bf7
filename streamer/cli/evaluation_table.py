"""Format an evaluation as a table that fits the screen."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import NO_LIMIT
from streamer.evaluation.view import figures, suggestion_lines

if TYPE_CHECKING:
    from streamer.evaluation.evaluation import Evaluation


def evaluation_table(
    evaluation: Evaluation,
    keep: float,
    inputs: tuple[str, str],
    findings: str | None = None,
    screen: Screen = NO_LIMIT,
    coefficients: str | None = None,
) -> str:
    """Format the figures of every variant, and below them the suggestion with the command that makes it.

    Parameters
    ----------
    keep
        Share of what was learned that a suggested variant keeps.
    inputs, findings, coefficients
        Base, adapter, findings and coefficients, as they were given.
    """
    columns = [
        Column(c.head, c.cells, c.about, c.keep, left=i == 0, names=False) for i, c in enumerate(figures(evaluation))
    ]
    suggestion = evaluation.best(keep)
    method = suggestion.variant and suggestion.variant.method
    more = ""
    if findings is not None and method in ("paper", "project"):
        more = f" --findings {shlex.quote(findings)}"
    elif coefficients is not None and method == "fitted":
        more = f" --coefficients {shlex.quote(coefficients)}"
    lines = suggestion_lines(evaluation, suggestion, shlex.join(inputs), more)
    return "\n\n".join([table(columns, screen.width), "\n".join(fit(line, screen.width) for line in lines)])
