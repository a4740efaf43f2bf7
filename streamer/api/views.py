"""Offer the texts and figures that tables show besides the results themselves."""

from __future__ import annotations

from streamer.detection.detection_memory import is_repeated
from streamer.detection.options import DetectionOptions
from streamer.evaluation.columns import figures
from streamer.evaluation.view import Names, commands, reasons, verdict
from streamer.measuring.identity import input_options
from streamer.methods import share_name, takes_findings
from streamer.output.record_view import record_lines
from streamer.plan.name_order import natural
from streamer.report.diff import FATES, fates_counted

__all__ = [
    "FATES", "DetectionOptions", "Names", "commands", "fates_counted", "figures", "input_options", "is_repeated", "natural", "reasons",
    "record_lines", "share_name", "takes_findings", "verdict",
]  # fmt: skip
