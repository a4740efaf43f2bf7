"""Make the stamp in the metadata of every written file: its inputs and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from streamer import __version__
from streamer.detection.findings_records import DecidingOptions
from streamer.detection.options import DetectionOptions
from streamer.json_types import Count
from streamer.plan.sources import NameSource, in_short

STAMP = "streamer"
"""Metadata key of the stamp."""


class DetectionRecord(DecidingOptions):
    """How an output's intruders were found."""

    certified: Annotated[Count, "Matrices with certified decisions only."]
    matrices: Annotated[Count, "Number of matrices."]


def detection_record(options: DetectionOptions, certified: int, matrices: int) -> DetectionRecord:
    """Record how an output's intruders were found."""
    return {"top_k": options.top_k, "threshold_epsilon": options.threshold_epsilon, "solver": options.solver,
            "certified": certified, "matrices": matrices}  # fmt: skip


def stamp(command: str, base: NameSource, adapter: NameSource, detection: DetectionRecord | None = None,
          mitigation: Mapping[str, Any] | None = None) -> str:  # fmt: skip
    """Make a file's stamp as JSON."""
    inputs = {"base": in_short(base), "adapter": in_short(adapter)}
    tree = {"version": __version__, "command": command, **inputs, **(mitigation or {}), "detection": detection}
    return json.dumps(tree, ensure_ascii=False)
