"""Offer the texts and figures that tables show besides the results themselves."""

from __future__ import annotations

from pathlib import Path

from streamer.adapters.finetuned import ByName
from streamer.api.records import several
from streamer.detection.detect import is_repeated
from streamer.detection.findings import Findings
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.words import ShellWords, commands, figures, reasons, verdict
from streamer.fitting.choice import repair_columns
from streamer.fitting.mapping import map_record
from streamer.measuring.facts import input_options
from streamer.methods import takes_findings
from streamer.output.record import record_lines
from streamer.plan.name_matching import natural
from streamer.storage.transaction import RECORD_NAME, record_at

__all__ = [
    "ByName",
    "Evaluation",
    "Findings",
    "ShellWords",
    "commands",
    "figures",
    "input_options",
    "is_mitigated",
    "is_repeated",
    "map_record",
    "natural",
    "reasons",
    "record_lines",
    "repair_columns",
    "several",
    "takes_findings",
    "verdict",
]


def is_mitigated(adapter: str | Path) -> bool:
    """Test whether an adapter is an output of `mitigate` or `repair`, other than one that was only converted, with λ = 1."""
    record = record_at(Path(adapter) / RECORD_NAME)
    return record is not None and record.get("lambda") != 1
