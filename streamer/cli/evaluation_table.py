"""Format an evaluation as a table that fits the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamer.api.views import Names, commands, figures, reasons, verdict
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import NO_LIMIT

if TYPE_CHECKING:
    from streamer.evaluation.evaluation import Evaluation


def evaluation_table(evaluation: Evaluation, names: Names, screen: Screen = NO_LIMIT, written: str = "") -> str:
    """Format the verdict, every variant's figures, the reasons, and the commands to run next.

    Parameters
    ----------
    written
        Line that says where the evaluation was written, or "".
    """
    columns = [
        Column(c.head, c.cells, c.about, c.priority, left=i == 0, names=False)
        for i, c in enumerate(figures(evaluation, screen.every))
    ]
    suggestion = evaluation.best()
    lines = [*reasons(evaluation, suggestion), written, *commands(evaluation, suggestion, names)]
    return "\n\n".join(
        [
            fit(verdict(evaluation, suggestion), screen.width),
            table(columns, screen),
            "\n".join(fit(line, screen.width) for line in lines if line),
        ]
    )
