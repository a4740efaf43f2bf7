"""Offer the texts and figures that tables show besides the results themselves."""

from __future__ import annotations

from streamer.adapters.finetuned import ByName
from streamer.api.records import several
from streamer.detection.detect import is_repeated
from streamer.evaluation.evaluation import Names, commands, figures, reasons, traded, verdict
from streamer.fitting.mapping import map_record
from streamer.measuring.runs import input_options
from streamer.methods import share_name, takes_findings
from streamer.output.job import record_lines
from streamer.plan.name_matching import natural
from streamer.report.diff import FATES, fates_counted

__all__ = [
    "FATES", "ByName", "Names", "commands", "fates_counted", "figures", "input_options", "is_repeated", "map_record",
    "natural", "reasons", "record_lines", "several", "share_name", "takes_findings", "traded", "verdict",
]  # fmt: skip
